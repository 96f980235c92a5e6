"""The pretrained base as one file to hand out, because pretraining takes some minutes.

python notebooks/base.py                 base.safetensors -> out/base-..., where train.py looks for it
python notebooks/base.py --pack          out/base-... -> base.safetensors
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from safetensors import safe_open
from safetensors.torch import save_file

import train

FILE = ROOT / "base.safetensors"


class Missing(Exception):
    """There is no base yet."""


def name_in(bases: Path) -> str:
    """The name of seed 0's base under `bases`; raises Missing if train.py would have to make it."""
    cfg = train.Config(method="pretrain", device="cpu")
    with mock.patch("train.working_in", side_effect=Missing(f"{bases} holds no pretrained base")):
        return train.get_base(cfg, str(bases))[1]


def pack(bases: Path, file: Path = FILE) -> None:
    name = name_in(bases)
    state = torch.load(bases / name / "state.pt", map_location="cpu", weights_only=True)
    about = {"name": name, "identity": json.dumps(state["identity"])}
    weights = {key: tensor.contiguous() for key, tensor in state["model"].items()}
    save_file(weights, file, metadata=about)
    file.chmod(0o644)


def unpack(bases: Path, file: Path = FILE) -> str:
    """-> the name of the base's folder. An existing folder is left alone."""
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
        weights = {key: opened.get_tensor(key) for key in opened.keys()}
    folder = bases / about["name"]
    if not folder.exists():
        folder.mkdir(parents=True)
        state = {"identity": json.loads(about["identity"]), "model": weights}
        torch.save(state, folder / "state.tmp")
        (folder / "state.tmp").replace(folder / "state.pt")
    return about["name"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pack", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "out")
    args = parser.parse_args()
    if args.pack:
        pack(args.out)
    elif FILE.exists():
        print(args.out / unpack(args.out))
    else:
        raise SystemExit(
            f"base.py: there is no {FILE.name} here: python train.py --method pretrain"
        )


if __name__ == "__main__":
    main()
