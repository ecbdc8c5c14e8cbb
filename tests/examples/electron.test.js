// The Node side of examples/electron with the real sidecar; `electron` itself is a stand-in of a few functions.
"use strict";

const assert = require("node:assert");
const { spawn } = require("node:child_process");
const { EventEmitter, once } = require("node:events");
const { mkdtempSync, readFileSync } = require("node:fs");
const Module = require("node:module");
const { tmpdir } = require("node:os");
const path = require("node:path");
const { after, test } = require("node:test");

const EXAMPLE = path.join(__dirname, "..", "..", "examples", "electron");
const { Sidecar, SidecarError } = require(path.join(EXAMPLE, "sidecar.js"));
const SMALL = { prompt: "a red house", size: "64x64", exact_size: true, seed: 7, steps: 2 };
const PNG = Buffer.from("\x89PNG", "latin1");

const until = async (condition) => {
  while (!condition()) await new Promise((resolve) => setTimeout(resolve, 10));
};

test("pictures, previews, cancel and errors of one sidecar, and its end", async () => {
  const loading = [];
  const sidecar = new Sidecar({ onLoading: (event) => loading.push(event.name) });
  const { protocol, models } = await sidecar.ready;
  assert.strictEqual(protocol, 1);
  assert.ok(models.length === 1 && loading.length > 0);
  const kinds = new Set();
  const drawn = sidecar.generate({ ...SMALL, n: 2, preview_every: 1 }, (event) => kinds.add(event.type));
  const images = await drawn.finished;
  assert.deepStrictEqual(images.map((image) => image.seed), [7, 8]);
  assert.ok(Buffer.from(images[0].b64_json, "base64").subarray(0, 4).equals(PNG));
  assert.ok(kinds.has("progress") && kinds.has("preview"));
  const long = sidecar.generate({ ...SMALL, steps: 1000 });
  long.cancel();
  await assert.rejects(long.finished, { name: "SidecarError", message: /cancelled/ });
  await assert.rejects(sidecar.generate({ ...SMALL, steps: 0 }).finished, (error) => {
    return error instanceof SidecarError && error.message.startsWith("steps is 0") && error.hint !== "";
  });
  // drawn or waiting
  const unfinished = assert.rejects(sidecar.generate({ ...SMALL, steps: 1000 }).finished, SidecarError);
  const [code] = await Promise.all([sidecar.close(), unfinished]);
  assert.strictEqual(code, 0);
  assert.ok(!sidecar.alive);
  await assert.rejects(sidecar.generate(SMALL).finished, SidecarError);
});

test("a command that is not there, and a sidecar that is killed", async () => {
  const missing = new Sidecar({ command: "no-such-command" });
  await assert.rejects(missing.ready, { message: /^cannot start no-such-command/, hint: "install sana-edge" });
  const unknown = new Sidecar({ options: ["--model", "no-such-model", "--offline"] });
  await assert.rejects(unknown.ready, /no-such-model/);
  await unknown.exited;
  const killed = new Sidecar();
  await killed.ready;
  const job = killed.generate({ ...SMALL, steps: 1000 });
  process.kill(killed.pid, "SIGKILL");
  await assert.rejects(job.finished, { message: "sana-edge ended (SIGKILL)" });
});

test("the sidecar ends when its parent is killed", async () => {
  const script = `
    const sidecar = new (require(${JSON.stringify(path.join(EXAMPLE, "sidecar.js"))}).Sidecar)();
    const draw = () => sidecar.generate(${JSON.stringify({ ...SMALL, steps: 1000 })}, () => console.log("draws"));
    sidecar.ready.then(draw);`;
  const parent = spawn(process.execPath, ["-e", script], { stdio: ["ignore", "pipe", "pipe"] });
  await once(parent.stdout, "data");
  parent.stderr.resume();
  parent.kill("SIGKILL");
  // both have it open: it ends with the last of them
  await once(parent.stderr, "end");
});

// What main.js asks of Electron.
function standIn(file) {
  const app = new EventEmitter();
  const handlers = new Map();
  const windows = [];
  class BrowserWindow extends EventEmitter {
    constructor(options) {
      super();
      this.options = options;
      this.sent = [];
      const send = (channel, event) => this.sent.push([channel, event]);
      this.webContents = { id: windows.push(this), isDestroyed: () => false, send };
    }
    loadFile(name) {
      this.file = name;
    }
    static getAllWindows() {
      return windows;
    }
  }
  Object.assign(app, { isPackaged: false, quit: () => app.emit("will-quit"), whenReady: async () => {} });
  const ipcMain = { handle: (channel, handler) => handlers.set(channel, handler) };
  const dialog = { showSaveDialog: async () => ({ filePath: file }) };
  const ask = (channel, ...words) => handlers.get(channel)({ sender: windows[0].webContents }, ...words);
  return { electron: { app, BrowserWindow, dialog, ipcMain }, windows, ask };
}

test("main.js: a page draws, cancels and saves, and quitting ends the sidecar", async () => {
  const file = path.join(mkdtempSync(path.join(tmpdir(), "sana-")), "house.png");
  const { electron, windows, ask } = standIn(file);
  const load = Module._load;
  Module._load = (name, ...rest) => (name === "electron" ? electron : load(name, ...rest));
  after(() => (Module._load = load));
  require(path.join(EXAMPLE, "main.js"));
  await until(() => windows.length);
  const { preload, contextIsolation, nodeIntegration, sandbox } = windows[0].options.webPreferences;
  assert.deepStrictEqual([contextIsolation, nodeIntegration, sandbox], [true, false, true]);
  assert.ok(readFileSync(preload) && readFileSync(windows[0].file));
  const answer = await ask("sana:generate", { prompt: "a red house", size: "64x64", seed: 7, steps: 4 });
  assert.ok(answer.seed === 7 && answer.src.startsWith("data:image/png;base64,"), JSON.stringify(answer));
  const kinds = windows[0].sent.map(([, event]) => event.type);
  assert.ok(kinds.includes("preview") && kinds.includes("progress") && kinds.includes("ready") && !kinds.includes("image"));
  assert.strictEqual(await ask("sana:save"), file);
  assert.ok(readFileSync(file).subarray(0, 4).equals(PNG));
  const wrong = await ask("sana:generate", { prompt: "" });
  assert.ok(wrong.error === "the prompt is empty" && wrong.hint);
  const long = ask("sana:generate", { prompt: "a house", steps: 1000 });
  await ask("sana:cancel");
  assert.match((await long).error, /cancelled/);
  const unfinished = ask("sana:generate", { prompt: "a house", steps: 1000 });
  electron.app.quit();
  assert.ok((await unfinished).error);
});
