"""SIMULATION of habana_frameworks.torch.utils.experimental."""


def _is_fp16_supported() -> bool:
    """Gaudi 2 and 3 have float16."""
    return True
