"""Automatic1111's API: webuiapi, and what Open WebUI, SillyTavern, LibreChat and Krita's Cyanic SD send."""

from __future__ import annotations

import base64
import io
import json
import threading
from typing import Any

import PIL.Image
import pytest
from serving import MODEL, SMALL, Client, FakeLoader, until

from sana_edge.serve.service import Service

API = "/sdapi/v1"

# the lists that SillyTavern fetches before it draws, and what it reads of their entries
LISTS = {
    **dict.fromkeys(("samplers", "schedulers", "upscalers", "latent-upscale-modes"), "name"),
    "sd-vae": "model_name",
    "sd-models": "title",
}
# Cyanic SD, of Krita, fetches these once it is connected
KRITA_LISTS = (
    *("sd-models", "sd-vae", "samplers", "upscalers", "face-restorers", "prompt-styles", "scripts", "loras"),
    *("embeddings", "hypernetworks", "options"),
)

OPEN_WEBUI = {"prompt": "a red house", "batch_size": 1, "width": 64, "height": 64, "negative_prompt": "fog"}
LIBRECHAT = {
    "prompt": "a red house",
    "negative_prompt": "fog",
    "cfg_scale": 4.5,
    "steps": 2,
    "width": 64,
    "height": 64,
}
SILLY_TAVERN = {
    "url": "http://127.0.0.1:8188",
    "auth": "user:key",
    "prompt": "a red house",
    "negative_prompt": "",
    "sampler_name": "DPM++ 2M Karras",
    "scheduler": "Automatic",
    "steps": 2,
    "cfg_scale": 7,
    "width": 64,
    "height": 64,
    "restore_faces": False,
    "enable_hr": True,
    "hr_upscaler": "Latent",
    "hr_scale": 2,
    "hr_additional_modules": [],
    "denoising_strength": 0.7,
    "hr_second_pass_steps": 0,
    "seed": -1,
    "override_settings": {"CLIP_stop_at_last_layers": 1, "sd_vae": "Automatic"},
    "override_settings_restore_afterwards": True,
    "clip_skip": 1,
    "save_images": True,
    "send_images": True,
    "do_not_save_grid": False,
    "do_not_save_samples": False,
}
KRITA = {
    "width": 64,
    "height": 64,
    "override_settings": {"sd_model_checkpoint": MODEL, "sd_vae": "Automatic"},
    "override_settings_restore_afterwards": False,
    "sampler_name": "",
    "steps": 2,
    "prompt": "a red house",
    "negative_prompt": "",
    "n_iter": 1,
    "batch_size": 2,
    "cfg_scale": 7,
    "seed": -1,
    "subseed": -1,
    "subseed_strength": 0.0,
}
# its mask is of one bit
KRITA_MASK = {
    "mask_blur": 4,
    "inpainting_mask_invert": 0,
    "inpainting_fill": 1,
    "inpaint_full_res": 0,
    "inpaint_full_res_padding": 32,
    "denoising_strength": 0.7,
}


def png(image: PIL.Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_webuiapi(real: Client) -> None:
    webuiapi = pytest.importorskip("webuiapi")
    api = webuiapi.WebUIApi(host=real.host, port=real.port)
    result = api.txt2img(prompt="a red house", seed=7, steps=2, width=64, height=64, batch_size=2)
    assert [image.size for image in result.images] == [(64, 64)] * 2
    assert result.info["all_seeds"] == [7, 8] and result.info["steps"] == 2
    assert "sampler 'Euler a' is not there: the model's own is used" in result.info["notes"]
    assert result.info["sampler_name"] == "flow-dpm"
    # it reads the picture's metadata, which is ours
    assert json.loads(result.image.info["sana_edge"])["seed"] == 7
    assert api.get_sd_models()[0]["title"] == MODEL
    assert [sampler["name"] for sampler in api.get_samplers()][:1] == ["flow-dpm"]
    assert api.get_progress()["progress"] == 0
    api.util_set_model("second")
    assert api.util_get_current_model() == "second"
    api.util_set_model(MODEL)
    api.interrupt()


def test_open_webui(real: Client) -> None:
    key = {"Authorization": "Basic dXNlcjprZXk="}
    options = real.get(f"{API}/options", **key).json
    assert options["sd_model_checkpoint"] == MODEL
    assert [(one["title"], one["model_name"]) for one in real.get(f"{API}/sd-models", **key).json] == [
        (name, name) for name in (MODEL, "second")
    ]
    assert real.post(f"{API}/options", {**options, "sd_model_checkpoint": MODEL}, **key).status == 200
    answer = real.post(f"{API}/txt2img", {**OPEN_WEBUI, "steps": 2}, **key).json
    assert len(answer["images"]) == 1 and json.loads(answer["info"])["negative_prompt"] == "fog"


def test_librechat(real: Client) -> None:
    info = real.post(f"{API}/txt2img", LIBRECHAT).json["info"]
    assert isinstance(info, str)
    read = json.loads(info)
    assert (read["width"], read["height"]) == (64, 64) and isinstance(read["seed"], int)
    assert read["infotexts"][0].splitlines()[:2] == ["a red house", "Negative prompt: fog"]


def test_silly_tavern(real: Client) -> None:
    assert real.get(f"{API}/options").status == 200
    names = {path: [one[key] for one in real.get(f"{API}/{path}").json] for path, key in LISTS.items()}
    assert names["sd-models"] == [MODEL, "second"] and names["samplers"] and names["upscalers"] == ["None"]
    # after a change of the model it waits until nothing is drawn
    assert real.post(f"{API}/options", {"sd_model_checkpoint": "second"}).status == 200
    progress = real.get(f"{API}/progress").json
    assert progress["progress"] == 0 and progress["state"]["job_count"] == 0
    answer = real.post(f"{API}/txt2img", SILLY_TAVERN).json
    info = json.loads(answer["info"])
    assert len(answer["images"]) == 1 and real.get(f"{API}/options").json["sd_model_checkpoint"] == "second"
    assert any("enable_hr" in note for note in info["notes"])
    assert any("DPM++ 2M Karras" in note for note in info["notes"])
    assert not any("restore_faces" in note for note in info["notes"])
    real.post(f"{API}/options", {"sd_model_checkpoint": MODEL})
    scripts = {"ADetailer": {"args": [True]}}
    answer = real.post(f"{API}/txt2img", {**SILLY_TAVERN, "alwayson_scripts": scripts}).json
    assert any("alwayson_scripts" in note for note in json.loads(answer["info"])["notes"])


def test_silly_tavern_hangs_up_and_interrupts(fake: Client, service: Service, loader: FakeLoader) -> None:
    loader.gate = threading.Semaphore(0)
    connection = fake.send(f"{API}/txt2img", SILLY_TAVERN)
    until(lambda: service.queue.running)
    assert fake.ask("POST", f"{API}/interrupt").status == 200
    connection.close()
    until(lambda: service.ended["cancelled"] == 1 and not service.queue.running)


def test_krita(real: Client) -> None:
    """As its plugin Cyanic SD asks; whether anybody is there it asks the web UI's queue."""
    assert real.get("/queue/status").json == {"msg": "estimation", "queue_size": 0}
    assert all(real.get(f"{API}/{name}").status == 200 for name in KRITA_LISTS)
    drawn = real.post(f"{API}/txt2img", {**KRITA, "enable_hr": False}).json
    assert len(drawn["images"]) == drawn["parameters"]["batch_size"] * drawn["parameters"]["n_iter"] == 2
    assert len(json.loads(drawn["info"])["all_seeds"]) == 2
    picture = PIL.Image.new("RGB", (64, 64), "red")
    mask = PIL.Image.new("1", (64, 64))
    mask.paste(1, (32, 0, 64, 64))
    start = {**KRITA, **KRITA_MASK, "steps": 4, "batch_size": 1, "init_images": [png(picture)]}
    for body in (start, {**start, "mask": png(mask)}):
        answer = real.post(f"{API}/img2img", body)
        assert answer.status == 200, answer.body
        image = PIL.Image.open(io.BytesIO(base64.b64decode(answer.json["images"][0])))
        assert image.size == (64, 64)
    # what was not in the mask is as it was, beyond three deviations of its blur
    assert image.crop((0, 0, 20, 64)).getcolors() == [(20 * 64, (255, 0, 0))]
    assert image.crop((20, 0, 32, 64)).getcolors() != [(12 * 64, (255, 0, 0))]
    assert image.crop((32, 0, 64, 64)).getcolors() != [(32 * 64, (255, 0, 0))]


def test_settings_of_a_mask(real: Client) -> None:
    """What has no effect is said; a mask that is blurred along y alone keeps its edge along x."""
    mask = PIL.Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    body = {
        "prompt": "a red house",
        "steps": 2,
        "seed": 7,
        "denoising_strength": 1.0,
        "init_images": [png(PIL.Image.new("RGB", (64, 64), "red"))],
        "mask": png(mask),
        "inpaint_full_res": True,
        "inpainting_fill": 0,
        "mask_blur_x": 0,
        "mask_blur_y": 4,
    }
    answer = real.post(f"{API}/img2img", body)
    assert answer.status == 200, answer.body
    notes = json.loads(answer.json["info"])["notes"]
    assert [note.split()[0] for note in notes[:2]] == ["inpaint_full_res", "inpainting_fill"]
    image = PIL.Image.open(io.BytesIO(base64.b64decode(answer.json["images"][0])))
    assert image.crop((0, 0, 32, 64)).getcolors() == [(32 * 64, (255, 0, 0))]
    refused = real.post(f"{API}/img2img", {**body, "mask_blur": 1000})
    assert refused.status == 422 and "mask_blur" in refused.json["error"], refused.body


def test_progress_with_a_preview_and_interrupt(fake: Client, service: Service, loader: FakeLoader) -> None:
    loader.gate = threading.Semaphore(0)
    answers: list[Any] = []
    body = {**SMALL, "steps": 4, "batch_size": 2}
    thread = threading.Thread(target=lambda: answers.append(fake.post(f"{API}/txt2img", body)))
    thread.start()
    first = until(lambda: (found := fake.get(f"{API}/progress").json)["state"]["job_count"] and found)
    assert first["state"]["job_count"] == 2 and first["current_image"] is None
    loader.gate.release(6)
    second = until(lambda: (found := fake.get(f"{API}/progress").json)["progress"] == 6 / 8 and found)
    assert second["state"] | {"sampling_step": 2, "sampling_steps": 4, "job_no": 1} == second["state"]
    assert second["current_image"]
    other = service.workers["two"]
    assert fake.post(f"{API}/interrupt").status == 200
    thread.join()
    # nothing says what to show
    assert answers[0].status == 409 and answers[0].json["error"] == "the generation was cancelled"
    assert fake.get(f"{API}/progress?skip_current_image=true").json["state"]["job_count"] == 0
    assert not other.loaded


def test_interrupt_leaves_other_faces_alone(fake: Client, service: Service, loader: FakeLoader) -> None:
    loader.gate = threading.Semaphore(0)
    job = fake.post("/v1/jobs", SMALL).json["id"]
    until(lambda: service.queue.running)
    fake.post(f"{API}/interrupt")
    loader.gate.release(9)
    until(lambda: fake.get(f"/v1/jobs/{job}").json["state"] == "done")


def test_model_by_name(fake: Client, loader: FakeLoader) -> None:
    for settings, model in (({"sd_model_checkpoint": "two"}, "two"), ({"sd_model_checkpoint": "x"}, "one")):
        answer = fake.post(f"{API}/txt2img", {**SMALL, "override_settings": settings})
        assert json.loads(answer.json["info"])["sd_model_name"] == model
    fake.post(f"{API}/options", {"sd_model_checkpoint": "three"})
    fake.post(f"{API}/options", {"sd_model_checkpoint": "../../etc/passwd"})
    assert fake.get(f"{API}/options").json["sd_model_checkpoint"] == "three"
    assert fake.post(f"{API}/txt2img", SMALL).status == 200 and "three" in loader.loaded


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"prompt": 3}, "prompt is 3"),
    ({"prompt": ""}, "the prompt is empty"),
    ({"width": 64}, "width is 64, height is None"),
    ({"width": "64", "height": 64}, "width is"),
    ({"width": 0, "height": 64}, "too small"),
    ({"batch_size": 0}, "batch_size is 0"),
    ({"batch_size": 4, "n_iter": 4}, "batch_size 4 times n_iter 4 is 16"),
    ({"n_iter": 1.5}, "n_iter is 1.5"),
    ({"steps": 0}, "steps is 0"),
    ({"cfg_scale": "7"}, "cfg_scale is '7'"),
    ({"cfg_scale": -3}, "guidance is -3"),
    ({"seed": -2}, "seed is -2"),
    ({"sampler_name": 4}, "sampler_name is 4"),
    ({"override_settings": []}, "override_settings is []"),
    ({"override_settings": {"sd_model_checkpoint": ["x"]}}, "sd_model_checkpoint is ['x']"),
    ({"negative_prompt": {}}, "negative_prompt is {}"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG, ids=[str(wrong)[:40] for wrong, _ in WRONG])
def test_every_field_wrong_in_turn(idle: Client, wrong: dict[str, Any], message: str) -> None:
    answer = idle.post(f"{API}/txt2img", {**SMALL, **wrong})
    assert answer.status == 422 and message in answer.json["error"]
    assert answer.json["hint"] and answer.json["detail"].startswith(answer.json["error"])


def test_what_is_not_there(fake: Client) -> None:
    assert fake.get(f"{API}/nothing").json["detail"].startswith("GET /sdapi/v1/nothing: not found")


def test_variation_seeds(fake: Client, service: Service) -> None:
    """The seed stays, and the others count up, as in the web UI."""
    body = {**SMALL, "batch_size": 2, "subseed": 50, "subseed_strength": 0.3}
    info = json.loads(fake.post(f"{API}/txt2img", body).json["info"])
    assert (info["all_subseeds"], info["subseed_strength"]) == ([50, 51], 0.3)
    assert "Variation seed: 51, Variation seed strength: 0.3" in info["infotexts"][1]
    random = json.loads(fake.post(f"{API}/txt2img", {**body, "subseed": -1}).json["info"])
    assert random["subseed"] not in (-1, 50) and random["all_seeds"] == [7, 7]
    none = json.loads(fake.post(f"{API}/txt2img", {**body, "subseed_strength": 0}).json["info"])
    assert (none["all_subseeds"], none["all_seeds"]) == ([0, 0], [7, 8])
    for wrong in ({"subseed": -2}, {"subseed": "x"}, {"subseed_strength": 1.5}, {"subseed_strength": "x"}):
        assert fake.post(f"{API}/txt2img", {**body, **wrong}).status == 422


def test_kind_of_previews(fake: Client, service: Service, loader: FakeLoader) -> None:
    """Cheap ones unless the options ask for decodes."""
    for chosen, level in ((None, 1), ("Full", 0), ("Approx NN", 1)):
        if chosen is not None:
            fake.post(f"{API}/options", {"show_progress_type": chosen})
            assert fake.get(f"{API}/options").json["show_progress_type"] == chosen
        loader.gate = threading.Semaphore(0)
        for one in loader.models.values():
            one.gate = loader.gate
        thread = threading.Thread(target=fake.post, args=[f"{API}/txt2img", {**SMALL, "steps": 4}])
        thread.start()
        until(lambda: fake.get(f"{API}/progress").json["state"]["job_count"])
        loader.gate.release(2)
        data = until(lambda: fake.get(f"{API}/progress").json["current_image"])
        assert PIL.Image.open(io.BytesIO(base64.b64decode(data))).getpixel((0, 0)) == (level,) * 3
        loader.gate.release(9)
        thread.join()
