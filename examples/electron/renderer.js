// The page: fields in, previews and the picture out. It knows nothing but `window.sana`, of preload.js.
"use strict";

const at = (id) => document.getElementById(id);
const number = (id) => (at(id).value === "" ? null : Number(at(id).value));

function show(src, alt) {
  at("picture").src = src;
  at("picture").alt = alt;
  at("picture").hidden = false;
}

function busy(is) {
  at("generate").disabled = is;
  at("cancel").disabled = !is;
  at("progress").value = 0;
}

window.sana.onEvent((event) => {
  if (event.type === "ready") at("status").textContent = "Ready";
  if (event.type === "error") at("status").textContent = `${event.error}. ${event.hint}`;
  if (event.type === "progress") {
    at("progress").value = event.count ? event.done / event.count : 0;
    const left = event.seconds_left ? `, ${Math.ceil(event.seconds_left)} s left` : "";
    at("status").textContent = `${event.stage}${left}`;
  }
  if (event.type === "preview") show(`data:${event.media_type};base64,${event.b64_json}`, "Preview");
});

document.querySelector("form").addEventListener("submit", async (submitted) => {
  submitted.preventDefault();
  busy(true);
  const prompt = at("prompt").value;
  const answer = await window.sana.generate({
    prompt, size: at("size").value, steps: number("steps"), seed: number("seed"),
  });
  busy(false);
  if (answer.error) {
    at("status").textContent = `${answer.error}. ${answer.hint}`;
    return;
  }
  show(answer.src, prompt);
  at("save").disabled = false;
  at("status").textContent = [`Seed ${answer.seed}`, ...answer.notes].join(". ");
});
at("cancel").addEventListener("click", () => window.sana.cancel());
at("save").addEventListener("click", async () => {
  const path = await window.sana.save();
  if (path) at("status").textContent = `Saved ${path}`;
});
