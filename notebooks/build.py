"""Build the notebooks: `python notebooks/build.py` makes all, `python notebooks/build.py 01 03` two of them.

Each notebooks/0*.py, a script in percent format, is executed and becomes the .ipynb beside it, with its outputs; the first
picture of the cell tagged "thumbnail" becomes results/thumbnails/0*.png. On one machine two builds are equal byte for byte
but for the cells tagged "timing": one thread, cell ids by number, no timestamps, no paths, nothing from stderr.
"""

import base64
import io
import json
import os
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
HEADER = re.compile(r"# %%(?P<markdown> \[markdown\])?(?: tags=(?P<tags>\[.*\]))?")
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def cells(source: str) -> list[dict]:
    """Percent format -> [{"type", "tags", "source"}, ...]: `# %%` opens a code cell, `# %% [markdown]` a text in comments."""
    found: list[dict] = []
    for line in source.splitlines():
        if header := HEADER.fullmatch(line):
            found.append(
                {
                    "type": "markdown" if header["markdown"] else "code",
                    "tags": json.loads(header["tags"] or "[]"),
                    "source": [],
                }
            )
        elif line.startswith("# %%") or not found:
            raise ValueError(f"not a cell header, or text before the first one: {line!r}")
        else:
            found[-1]["source"].append(
                re.sub("^# ?", "", line) if found[-1]["type"] == "markdown" else line
            )
    return [cell | {"source": "\n".join(cell["source"]).strip("\n")} for cell in found]


def small_png(data: bytes, width: int | None = None) -> bytes:
    """The picture in 256 colours and without metadata: a third of the bytes, and the same bytes from the same pixels."""
    from PIL import Image

    image = Image.open(io.BytesIO(data)).convert("RGB")
    if width:
        image = image.resize((width, round(image.height * width / image.width)), Image.LANCZOS)
    image.quantize(256).save(packed := io.BytesIO(), "PNG", optimize=True)
    return packed.getvalue()


def execute(path: Path) -> tuple[str, bytes | None]:
    """-> (the notebook's text, its thumbnail)."""
    import nbclient
    import nbformat
    from nbformat import v4

    os.environ.pop("MPLBACKEND", None)  # the notebook's own, or there are no pictures
    notebook, thumbnail = v4.new_notebook(metadata=METADATA), None
    for i, cell in enumerate(cells(path.read_text())):
        new = {"code": v4.new_code_cell, "markdown": v4.new_markdown_cell}[cell["type"]]
        notebook.cells.append(
            new(
                cell["source"],
                id=f"cell-{i:02}",
                metadata={"tags": cell["tags"]} if cell["tags"] else {},
            )
        )
    nbclient.NotebookClient(
        notebook,
        timeout=1200,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(HERE)}},
    ).execute()
    notebook.metadata = METADATA  # the kernel adds its version
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        # without progress bars
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        pictures = [output for output in cell.outputs if "image/png" in output.get("data", {})]
        for data in (output.data for output in pictures):
            picture = base64.b64decode(data["image/png"])
            data["image/png"] = base64.b64encode(small_png(picture)).decode()
            if "thumbnail" in cell.metadata.get("tags", []):
                thumbnail = thumbnail or small_png(picture, width=400)
    return nbformat.writes(notebook) + "\n", thumbnail


def main(names: list[str]) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}  # the kernel inherits them
    for path in sorted(HERE.glob("0*.py")):
        if not names or path.name.startswith(tuple(names)):
            text, thumbnail = execute(path)
            path.with_suffix(".ipynb").write_text(text)
            print(f"{path.stem}.ipynb: {len(text.encode()) / 1000:.0f} kB")
            if thumbnail:
                (HERE / "results" / "thumbnails").mkdir(parents=True, exist_ok=True)
                (HERE / "results" / "thumbnails" / f"{path.name[:2]}.png").write_bytes(thumbnail)


if __name__ == "__main__":
    main(sys.argv[1:])
