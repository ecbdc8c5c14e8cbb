"""SANA's complex human instruction (CHI), the text in front of every prompt; a fixed model input, kept byte for byte.

Source: arXiv 2410.10629 section 2.3. The wording is the default of `complex_human_instruction` in diffusers'
SanaPipeline and SanaSprintPipeline (Apache-2.0), which the public checkpoints are used with there; the
original training configuration differs only in the quotes around "Enhanced prompt".
"""

# ruff: noqa: E501 (a model input: its lines may not be wrapped)

from __future__ import annotations

CHI: tuple[str, ...] = (
    "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual descriptions suitable for image generation. Evaluate the level of detail in the user prompt:",
    "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, textures, and spatial relationships to create vivid and concrete scenes.",
    "- If the prompt is already detailed, refine and enhance the existing details slightly without overcomplicating.",
    "Here are examples of how to transform or refine prompts:",
    "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round shape, sleeping peacefully on a warm sunny windowsill, surrounded by pots of blooming red flowers.",
    "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, featuring glowing street lamps, a diverse crowd of people in colorful clothing, and a double-decker bus passing by towering glass skyscrapers.",
    "Please generate only the enhanced description for the prompt below and avoid including any additional commentary or evaluations:",
    "User Prompt: ",
)
