"""Build the notebooks.

    python notebooks/build.py                    execute all; `build.py 01 03` two of them
    python notebooks/build.py --class FOLDER     copies for a class: no outputs, and no answers

Each notebooks/0*.py, a script in percent format, is executed and becomes the .ipynb beside it, with its outputs; the first
picture of the cell tagged "thumbnail" becomes results/thumbnails/0*.png. On one machine two builds are equal byte for byte
but for the cells tagged "timing": one thread, cell ids by number, no timestamps, no paths, nothing from stderr.

The cells tagged "answer" are the folded answers and the checks that would give them away. A class copy leaves them out;
nothing depends on them. It runs from any folder that lies at most two levels below the top of a clone.
"""

import argparse
import base64
import io
import json
import os
import re
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
HEADER = re.compile(r"# %%(?P<markdown> \[markdown\])?(?: tags=(?P<tags>\[.*\]))?")
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


PUBLIC = re.compile(
    r"(?:https://|(?:ssh://)?git@)(git(?:hub|lab)\.com|codeberg\.org)[:/]([\w./-]+?)(?:\.git)?/?"
)


def public_address() -> str:
    """Where the clone's remote can be fetched from by anyone, or "": no other address gets into a notebook."""
    command = ["git", "-C", HERE, "remote", "get-url", "origin"]
    said = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    found = PUBLIC.fullmatch(said)
    return f"https://{found[1]}/{found[2]}" if found else ""


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


def unexecuted(path: Path, address: str = "", leave_out: str | None = None):
    """The notebook of a source; its first cell gets the address that it fetches the project from."""
    from nbformat import v4

    notebook = v4.new_notebook(metadata=METADATA)
    source = path.read_text().replace('REPOSITORY = ""', f'REPOSITORY = "{address}"', 1)
    for i, cell in enumerate(cells(source)):
        if leave_out not in cell["tags"]:
            new = {"code": v4.new_code_cell, "markdown": v4.new_markdown_cell}[cell["type"]]
            metadata = {"tags": cell["tags"]} if cell["tags"] else {}
            notebook.cells.append(new(cell["source"], id=f"cell-{i:02}", metadata=metadata))
    return notebook


def small_png(data: bytes, width: int | None = None) -> bytes:
    """The picture in 256 colours and without metadata: a third of the bytes, and the same bytes from the same pixels."""
    from PIL import Image

    image = Image.open(io.BytesIO(data))
    if getattr(image, "is_animated", False) and not width:
        return data
    image = image.convert("RGB")
    if width:
        image = image.resize((width, round(image.height * width / image.width)), Image.LANCZOS)
    image.quantize(256).save(packed := io.BytesIO(), "PNG", optimize=True)
    return packed.getvalue()


def execute(path: Path) -> tuple[str, bytes | None]:
    """-> (the notebook's text, its thumbnail)."""
    import nbclient
    import nbformat

    os.environ.pop("MPLBACKEND", None)  # the notebook's own, or there are no pictures
    notebook, thumbnail = unexecuted(path, public_address()), None
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="01, 03_four, ...; without: all")
    parser.add_argument("--class", dest="folder", type=Path, help="write copies for a class there")
    args = parser.parse_args(argv)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}  # the kernel inherits them
    for path in sorted(HERE.glob("0*.py")):
        if args.names and not path.name.startswith(tuple(args.names)):
            continue
        if args.folder:
            import nbformat

            args.folder.mkdir(parents=True, exist_ok=True)
            copy = unexecuted(path, public_address(), leave_out="answer")
            nbformat.write(copy, args.folder / f"{path.stem}.ipynb")
            continue
        text, thumbnail = execute(path)
        path.with_suffix(".ipynb").write_text(text)
        print(f"{path.stem}.ipynb: {len(text.encode()) / 1000:.0f} kB")
        if thumbnail:
            (HERE / "results" / "thumbnails").mkdir(parents=True, exist_ok=True)
            (HERE / "results" / "thumbnails" / f"{path.name[:2]}.png").write_bytes(thumbnail)


if __name__ == "__main__":
    main()
