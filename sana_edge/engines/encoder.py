"""The encoder of an exported folder: a picture to the latent that the steps start from, whole or in tiles."""

from __future__ import annotations

import logging

from sana_edge.decoding import DEFAULT_TILE
from sana_edge.engines.memory import Memory
from sana_edge.engines.sessions import DECODER, DENOISER, TEXT, Graphs
from sana_edge.engines.text import Floats
from sana_edge.engines.tiles import encode_tiles
from sana_edge.errors import InvalidInput
from sana_edge.request.plan import Plan
from sana_edge.sampler import Origin
from sana_edge.store.manifest import ENCODER

logger = logging.getLogger("sana_edge")


class EngineEncoder:
    """Encodes a plan's image; its engine is in memory only meanwhile."""

    def __init__(self, graphs: Graphs, memory: Memory) -> None:
        self._graphs, self._memory = graphs, memory

    def check(self) -> None:
        """Raise `InvalidInput` where there is no encoder."""
        described = self._graphs.described
        if ENCODER not in described.graphs:
            found = f"{described.name} was exported without an encoder, which an image needs"
            command = described.export_command(int8=described.quantization is not None)
            raise InvalidInput(found, f"`{command} --encoder` makes one that has it")
        if self._graphs.kind.name == "tensorrt":
            found = "TensorRT's engines have no encoder, which an image needs"
            raise InvalidInput(found, "choose another backend")

    def encode(self, plan: Plan) -> Origin[Floats]:
        """The latent of a plan's image, and its mask."""
        assert plan.init is not None
        described = self._graphs.described
        self._graphs.make_room(TEXT, DENOISER, DECODER, for_graph=ENCODER)
        drawn = (plan.width, plan.height)

        def encode(pixels: Floats) -> Floats:
            return self._graphs.run(ENCODER, pixels=pixels)["latent"]

        cell, tile = described.cell, None
        whole = next(s for s in self._memory.stages(plan) if s.name == ENCODER).working
        free = self._memory.free()
        if described.size is None and free is not None and whole > free:
            tile = DEFAULT_TILE
            logger.warning("the image is encoded in tiles of %s pixels, as memory is short: it differs", tile)
        latent = encode_tiles(plan.init.at(drawn), encode, cell=cell, tile=tile)
        # it is needed once a picture
        self._graphs.close(ENCODER)
        return Origin(latent, plan.init.cells(drawn, described.cell))
