// All that the page can reach of Node: three questions and the events.
"use strict";

const { contextBridge, ipcRenderer } = require("electron");

contextBridge.exposeInMainWorld("sana", {
  generate: (fields) => ipcRenderer.invoke("sana:generate", fields),
  cancel: () => ipcRenderer.invoke("sana:cancel"),
  save: () => ipcRenderer.invoke("sana:save"),
  onEvent: (listener) => ipcRenderer.on("sana:event", (_, event) => listener(event)),
});
