"""Which networks a checkpoint's tensor names belong to, under whatever prefix a training has put them.

``state_dict_ema.module.blocks.0.attn.qkv.weight`` is a tensor of NVlabs' denoiser under ``state_dict_ema.``:
one network has one tensor that no other has, and what stands before its name is the prefix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

DENOISER, AUTOENCODER, TINY, TEXT = "denoiser", "autoencoder", "tiny autoencoder", "text encoder"

# the network, whether the names are diffusers' or transformers', the tensor that only it has
_NETWORKS = tuple(
    (network, published, re.compile(rf"(?P<prefix>(?:.*\.)?){pattern}"))
    for network, published, pattern in (
        (DENOISER, False, r"x_embedder\.proj\.weight"),
        (DENOISER, True, r"transformer_blocks\.0\.ff\.conv_inverted\.weight"),
        (AUTOENCODER, False, r"decoder\.project_in\.(?:main\.)?conv\.weight"),
        (AUTOENCODER, True, r"decoder\.norm_out\.weight"),
        # a plain sequence of layers, whose encoder has other convolutions at these places
        (TINY, False, r"(?<!layers\.)3\.conv\.0\.weight"),
        (TINY, True, r"decoder\.layers\.2\.conv\.0\.weight"),
        (TEXT, True, r"layers\.0\.pre_feedforward_layernorm\.weight"),
    )
)
# what torch.compile, data parallelism and checkpointing put between the parts of a name
_WRAPPERS = re.compile(
    r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\."
)
_AVERAGED = re.compile(r"(?:^|[._])(?:ema|shadow|averaged|swa)\d*(?:[._]|$)", re.IGNORECASE)
_HELPER = re.compile(r"(?:^|[._])(?:teacher|discriminator|critic|fake|real|guidance|target)(?:[._]|$)")
_LORA = re.compile(r"(?:^|[._])lora(?:[._]?(?:A|B|up|down|mid))?(?:[._]|$)|\.(?:hada|lokr|dora)_")
_LORA_FILE = re.compile(r"(?:^|[_.-])(?:loras?|adapters?)(?=[_.-]|$)", re.IGNORECASE)
_TINY_BLOCK = re.compile(r"(?:encoder\.(?:layers\.)?)?\d+\.conv\.0\.weight")
_FOREIGN_INT = re.compile(r"\.(?:qweight|wscales|absmax|quant_map|qzeros)(?:\.|$)|\.quant_state\.")


@dataclass(frozen=True)
class Network:
    """One network in a checkpoint: ``published`` where its names are those of diffusers or transformers."""

    network: str
    published: bool
    prefix: str

    @property
    def averaged(self) -> bool:
        """Whether it is a moving average of a training's weights (EMA)."""
        return _AVERAGED.search(self.prefix) is not None

    @property
    def helper(self) -> bool:
        """Whether a training used it to teach the network that was meant."""
        return _HELPER.search(self.prefix) is not None


def plain_name(name: str) -> str:
    """A tensor's name without the wrappers of training."""
    return _WRAPPERS.sub("", name)


def networks(names: Iterable[str]) -> list[Network]:
    """The networks among `plain_name`s, denoisers first, each with the shorter prefixes first."""
    order = (DENOISER, AUTOENCODER, TINY, TEXT)
    found = {
        Network(network, published, match["prefix"])
        for name in names
        for network, published, pattern in _NETWORKS
        if (match := pattern.fullmatch(name))
    }
    return sorted(found, key=lambda n: (order.index(n.network), n.helper, len(n.prefix), n.prefix))


def own_names(names: Iterable[str]) -> dict[str, str]:
    """Stored names of one component to its own: without wrappers, and without the prefix that all have."""
    plain = {name: plain_name(name) for name in names}
    found = networks(plain.values())
    prefix = found[0].prefix if found else ""
    if not all(name.startswith(prefix) for name in plain.values()):
        prefix = ""
    return {stored: name.removeprefix(prefix) for stored, name in plain.items()}


def is_lora(names: Iterable[str]) -> bool:
    """Whether tensors are, or have among them, the low-rank updates of another model's."""
    return any(_LORA.search(name) for name in names)


def is_lora_file(name: str) -> bool:
    """Whether a file's name says that it is a LoRA."""
    return _LORA_FILE.search(name) is not None


def is_tiny_encoder(names: Iterable[str]) -> bool:
    """Whether tensors are those of a tiny autoencoder's other half, by their author's names or diffusers'."""
    return any(_TINY_BLOCK.fullmatch(name) for name in names)


def is_foreign_package(names: Iterable[str]) -> bool:
    """Whether weights were quantized by another program."""
    return any(_FOREIGN_INT.search(name) for name in names)
