"""`python -m megatron.launch.node`: torchrun on one of several nodes, which all run it with the same words.

The node that a meeting point lies on has to serve it. torchrun takes a node for that one by comparing addresses of the
host's own name, which is 127.0.1.1 in Debian's /etc/hosts: where the meeting point is an address, nobody would serve.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from megatron.launch.hostfile import is_own_address


def with_role(words: Sequence[str], is_own: Callable[[str], bool]) -> list[str]:
    """Words of torchrun, and of its program after `--`, with whether this node serves the meeting point."""
    end = words.index("--")
    reader = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    reader.add_argument("--rdzv-endpoint", required=True)
    reader.add_argument("--rdzv-conf", default="")
    known, others = reader.parse_known_args(words[:end])
    serves = is_own(known.rdzv_endpoint.rpartition(":")[0])
    conf = ",".join(text for text in (known.rdzv_conf, f"is_host={serves}") if text)
    return [*others, "--rdzv-endpoint", known.rdzv_endpoint, "--rdzv-conf", conf, *words[end:]]


if __name__ == "__main__":
    from torch.distributed.run import main

    main(with_role(sys.argv[1:], is_own_address))
