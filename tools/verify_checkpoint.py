"""Checks a checkpoint: hashes of all files, completeness of the tensors, NaN and infinite values.

    python tools/verify_checkpoint.py DIR [--iteration N]

Needs memory for one tensor. Exit code 0: good; 1: damaged, or values that are not finite; 2: wrong usage.
"""

from __future__ import annotations

import argparse
import sys

from megatron.checkpoint.errors import CheckpointError, CorruptCheckpoint
from megatron.checkpoint.folder import latest, list_checkpoints
from megatron.checkpoint.location import Location, location
from megatron.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from megatron.checkpoint.verify import file_faults, index_faults, tensor_reports


def main() -> int:
    """Check one checkpoint and print what it holds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="folder or URL of a run's checkpoints, or of one checkpoint")
    parser.add_argument("--iteration", type=int, help="which checkpoint; default: the one a run would resume from")
    args = parser.parse_args()
    try:
        path = chosen(location(args.folder), args.iteration)
    except CorruptCheckpoint as error:
        print(f"DAMAGED: {error}")
        return 1
    except CheckpointError as error:
        parser.error(str(error))
    try:
        faults = report(path, read_manifest(path))
    except (CheckpointError, OSError) as error:
        faults = [str(error)]
    for fault in faults:
        print(f"DAMAGED: {fault}")
    print(f"{path}: {'damaged' if faults else 'good'}")
    return 1 if faults else 0


def chosen(folder: Location, iteration: int | None) -> Location:
    """The checkpoint that is meant.

    Raises:
        CheckpointError: there is none.
    """
    if (folder / MANIFEST).is_file():
        return folder
    present = list_checkpoints(folder)
    wanted = latest(folder) if iteration is None else iteration
    if wanted is None:
        raise CheckpointError(f"{folder} holds no checkpoint")
    if wanted in present:
        return present[wanted]
    message = f"{folder} has no checkpoint of iteration {wanted}; there are: {', '.join(map(str, present)) or 'none'}"
    raise CheckpointError(message) if iteration is not None else CorruptCheckpoint(message)


def report(path: Location, manifest: Manifest) -> list[str]:
    """Print the tables and return what is wrong."""
    size = sum(record.bytes for record in manifest.files.values())
    print(f"{path}: iteration {manifest.iteration}, {len(manifest.files)} files, {size / 1e6:.1f} MB, ", end="")
    print(f"{len(manifest.tensors)} tensors, written by torch {manifest.torch}")
    faults = file_faults(path, manifest)
    if faults or manifest.payload != "tensors":
        return faults
    faults = index_faults(path, manifest)
    print(f"{'NaN':>9} {'Inf':>9} {'largest':>11}  {'dtype':9} {'shape':20} name")
    for tensor in tensor_reports(path):
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        print(f"{tensor.nan:9d} {tensor.inf:9d} {tensor.largest:11.4e}  {tensor.dtype:9} {shape:20} {tensor.name}")
        if tensor.nan or tensor.inf:
            faults.append(f"{tensor.name}: {tensor.nan} NaN and {tensor.inf} infinite values")
    return faults


if __name__ == "__main__":
    sys.exit(main())
