// Electron's main process: it owns the sidecar, and pages ask it for pictures through preload.js.
"use strict";

const { writeFile } = require("node:fs/promises");
const path = require("node:path");
const { app, BrowserWindow, dialog, ipcMain } = require("electron");
const { Sidecar } = require("./sidecar.js");

// a frozen server (docs/embedding.md) lies beside a packaged application
const COMMAND = app.isPackaged ? path.join(process.resourcesPath, "sana-edge") : "sana-edge";

let sidecar = null;
// by the id of a page: what it is drawing, and its last picture
const jobs = new Map();
const pictures = new Map();

// The sidecar; one that has died is started again.
function running() {
  if (sidecar === null || !sidecar.alive) {
    sidecar = new Sidecar({ command: COMMAND, options: ["--int8"], onLoading: (event) => tell(event) });
    sidecar.ready.then(
      (event) => tell(event),
      (error) => tell({ type: "error", error: error.message, hint: error.hint }),
    );
  }
  return sidecar;
}

function tell(event, page = null) {
  const pages = page ? [page] : BrowserWindow.getAllWindows().map((window) => window.webContents);
  for (const one of pages) if (!one.isDestroyed()) one.send("sana:event", event);
}

// Answers {seed, src} or {error, hint}: of an exception only the message would reach the page.
async function generate({ sender: page }, { prompt, seed, steps, size }) {
  jobs.get(page.id)?.cancel();
  const job = running().generate({ prompt, seed, steps, size, preview_every: 3 }, (event) => {
    // the picture is the answer
    if (event.type !== "image") tell(event, page);
  });
  jobs.set(page.id, job);
  try {
    const [image] = await job.finished;
    pictures.set(page.id, image);
    return { seed: image.seed, src: `data:${image.media_type};base64,${image.b64_json}`, notes: image.notes };
  } catch (error) {
    return { error: error.message, hint: error.hint ?? "" };
  } finally {
    if (jobs.get(page.id) === job) jobs.delete(page.id);
  }
}

// Answers where it is; null where the user thought better of it.
async function save({ sender: page }) {
  const image = pictures.get(page.id);
  const { filePath } = await dialog.showSaveDialog({ defaultPath: `sana-${image.seed}.png` });
  if (!filePath) return null;
  await writeFile(filePath, Buffer.from(image.b64_json, "base64"));
  return filePath;
}

function open() {
  const webPreferences = {
    preload: path.join(__dirname, "preload.js"),
    contextIsolation: true,
    nodeIntegration: false,
    sandbox: true,
  };
  const window = new BrowserWindow({ width: 520, height: 820, webPreferences });
  const { id } = window.webContents;
  window.on("closed", () => {
    jobs.get(id)?.cancel();
    pictures.delete(id);
  });
  window.loadFile(path.join(__dirname, "index.html"));
}

ipcMain.handle("sana:generate", generate);
ipcMain.handle("sana:cancel", ({ sender: page }) => jobs.get(page.id)?.cancel());
ipcMain.handle("sana:save", save);

app.whenReady().then(() => {
  open();
  // the model loads while the user types
  running();
});
app.on("activate", () => BrowserWindow.getAllWindows().length || open());
app.on("window-all-closed", () => process.platform === "darwin" || app.quit());
app.on("will-quit", () => sidecar?.close());
