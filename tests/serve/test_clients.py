"""Clients that are not installed for the tests: each is tried where there is one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from serving import SMALL, Client

pytestmark = pytest.mark.slow

EXTRA = {name: value for name, value in SMALL.items() if name != "prompt"}
# a folder with node_modules: openai, ai, @ai-sdk/openai-compatible
NODE = os.environ.get("SANA_EDGE_NODE_FOLDER")


def test_litellm(real: Client) -> None:
    litellm: Any = pytest.importorskip("litellm")
    answer = litellm.image_generation(
        prompt="a red house",
        model="openai/sana",
        api_base=f"{real.url}/v1",
        api_key="none",
        n=3,
        size="64x64",
        extra_body=EXTRA,
    )
    assert len(answer.data) == 3 and all(entry.b64_json for entry in answer.data)


OPENAI = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: URL, apiKey: "none", maxRetries: 0 });
const whole = await client.images.generate({ prompt: "a red house", size: "64x64", n: 2, ...EXTRA });
const stream = await client.images.generate({
  prompt: "a red house", size: "64x64", stream: true, partial_images: 1, ...EXTRA
});
const kinds = [];
for await (const event of stream) kinds.push(event.type);
let status = 0;
try { await client.images.generate({ prompt: "", ...EXTRA }); } catch (error) { status = error.status; }
console.log(JSON.stringify({ pictures: whole.data.length, kinds, status }));
"""
AI = """
import { generateImage, experimental_generateImage } from "ai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
const provider = createOpenAICompatible({ name: "sana", baseURL: URL, apiKey: "none" });
const draw = generateImage ?? experimental_generateImage;
const { images } = await draw({
  model: provider.imageModel("sana-tiny"), prompt: "a red house", size: "64x64", n: 2,
  seed: 7, providerOptions: { sana: EXTRA }
});
console.log(JSON.stringify({ pictures: images.length, kinds: [images[0].mediaType] }));
"""


@pytest.mark.parametrize(("code", "kind"), [(OPENAI, "image_generation.completed"), (AI, "image/png")])
def test_node(real: Client, tmp_path: Path, code: str, kind: str) -> None:
    node = shutil.which("node")
    if node is None or NODE is None:
        pytest.skip("no node, or SANA_EDGE_NODE_FOLDER does not say where its modules are")
    script = Path(NODE) / f"{tmp_path.name}.mjs"
    head = f"const URL = {json.dumps(real.url + '/v1')}; const EXTRA = {json.dumps(EXTRA)};\n"
    imports = [line for line in code.splitlines() if line.startswith("import")]
    rest = [line for line in code.splitlines() if not line.startswith("import")]
    script.write_text("\n".join([*imports, head, *rest]))
    try:
        done = subprocess.run([node, script], capture_output=True, text=True, timeout=120)
    finally:
        script.unlink()
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["pictures"] == 2 and found["kinds"][-1] == kind and found.get("status", 400) == 400
