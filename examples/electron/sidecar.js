// A client of `sana-edge serve --stdio` in plain Node: for Electron's main process, a server or a script.
// docs/embedding.md has the lines that go to and fro.
"use strict";

const { spawn } = require("node:child_process");
const { randomUUID } = require("node:crypto");
const { createInterface } = require("node:readline");

// what a sidecar that is asked to end gets until it is killed, in milliseconds
const PATIENCE = 5000;

class SidecarError extends Error {
  constructor(message, hint = "") {
    super(message);
    this.name = "SidecarError";
    this.hint = hint;
  }
}

class Sidecar {
  #child;
  #jobs = new Map();
  #started;
  #onLoading;
  #failure = null;

  // `ready` is a promise of {protocol, version, models}; `onLoading` gets {name, done, count} before it
  constructor({ command = "sana-edge", options = [], onLoading = () => {} } = {}) {
    this.ready = new Promise((resolve, reject) => (this.#started = { resolve, reject }));
    this.#onLoading = onLoading;
    // who does not wait for it hears of the error from `generate`
    this.ready.catch(() => {});
    const stdio = ["pipe", "pipe", "inherit"];
    this.#child = spawn(command, ["serve", "--stdio", ...options], { stdio, windowsHide: true });
    this.exited = new Promise((resolve) => {
      this.#child.once("exit", (code, signal) => {
        this.#fail(new SidecarError(`sana-edge ended (${signal ?? code})`, "ask again: that starts it anew"));
        resolve(code);
      });
      this.#child.once("error", (error) => {
        this.#fail(new SidecarError(`cannot start ${command}: ${error.message}`, "install sana-edge"));
        resolve(null);
      });
    });
    // a line to one that is gone; "exit" says so as well
    this.#child.stdin.on("error", () => {});
    createInterface({ input: this.#child.stdout }).on("line", (line) => this.#take(JSON.parse(line)));
    // its end of stdin would end it too, at its next step
    this.onExit = () => this.#child.kill();
    process.once("exit", this.onExit);
  }

  get pid() {
    return this.#child.pid;
  }

  get alive() {
    return this.#failure === null;
  }

  // Draws; `onEvent` gets what happens, "progress" and "preview" above all. `finished` is a promise of the images.
  generate(fields, onEvent = () => {}) {
    const id = randomUUID();
    const finished = new Promise((resolve, reject) => {
      if (!this.alive) return reject(this.#failure);
      this.#jobs.set(id, { images: [], onEvent, resolve, reject });
      this.#send({ ...fields, type: "generate", id });
    });
    return { id, finished, cancel: () => this.#send({ type: "cancel", id }) };
  }

  // Ends it; what is drawn is cancelled. A promise of the exit code.
  close() {
    this.#send({ type: "shutdown" });
    this.#child.stdin.end();
    const timer = setTimeout(() => this.#child.kill("SIGKILL"), PATIENCE);
    return this.exited.finally(() => clearTimeout(timer));
  }

  #send(message) {
    if (this.#child.stdin.writable) this.#child.stdin.write(JSON.stringify(message) + "\n");
  }

  #take(event) {
    if (event.type === "ready") return this.#started.resolve(event);
    if (event.id === null) {
      if (event.type === "progress") this.#onLoading(event);
      if (event.type === "error") this.#started.reject(new SidecarError(event.error, event.hint));
      return;
    }
    const job = this.#jobs.get(event.id);
    if (job === undefined) return;
    job.onEvent(event);
    if (event.type === "image") job.images.push(event);
    if (!["done", "cancelled", "error"].includes(event.type)) return;
    this.#jobs.delete(event.id);
    if (event.type === "done") job.resolve(job.images);
    else job.reject(new SidecarError(event.error, event.hint));
  }

  #fail(error) {
    process.removeListener("exit", this.onExit);
    this.#failure = error;
    this.#started.reject(error);
    for (const job of this.#jobs.values()) job.reject(error);
    this.#jobs.clear();
  }
}

module.exports = { Sidecar, SidecarError };
