// The socket of a chat, which reconnects by itself.

/** A socket that reconnects after growing pauses and reports its state. */
export class Connection {
  constructor(url, after, { onEvent, onState }) {
    Object.assign(this, { url, last: after, onEvent, onState });
    this.wait = 500;
    this.ended = false;
    this.open();
    addEventListener("online", () => this.soon());
    addEventListener("offline", () => this.onState("offline"));
    addEventListener("pagehide", () => { this.ended = true; this.socket?.close(); });
    addEventListener("pageshow", (event) => { if (event.persisted) { this.ended = false; this.open(); } });
    document.addEventListener("visibilitychange", () => { if (!document.hidden) this.soon(); });
    setInterval(() => this.beat(), 10000);
  }

  get live() { return this.socket?.readyState === WebSocket.OPEN; }

  open() {
    clearTimeout(this.timer);
    if (this.ended) return;
    this.socket = new WebSocket(`${this.url}?after=${this.last}`);
    const socket = this.socket;
    this.heard = Date.now();
    socket.onmessage = ({ data }) => {
      if (socket !== this.socket) return;
      this.heard = Date.now();
      const event = JSON.parse(data);
      if (event.type === "connected") { this.wait = 500; this.onState("connected"); }
      this.onEvent(event);
      if (event.seq > this.last && !["connected", "pong"].includes(event.type) && !(event.type === "error" && !event.message)) this.last = event.seq;
    };
    socket.onclose = ({ code }) => {
      if (socket !== this.socket || this.ended) return;
      if (code === 4404) { this.ended = true; this.onState("gone"); return; }
      this.onState(navigator.onLine ? "reconnecting" : "offline");
      this.timer = setTimeout(() => this.open(), this.wait * (0.5 + Math.random()));
      this.wait = Math.min(this.wait * 2, 15000);
    };
  }

  /** Try now instead of later. */
  soon() { if (!this.ended && !this.live && this.socket?.readyState !== WebSocket.CONNECTING) { this.wait = 500; this.open(); } }

  beat() {
    if (this.ended || !this.live) return;
    if (Date.now() - this.heard > 25000) { this.socket.close(); return; } // no server there, whatever the network says
    this.socket.send(JSON.stringify({ type: "ping" }));
  }

  send(command) {
    if (!this.live) return false;
    this.socket.send(JSON.stringify(command));
    return true;
  }

  /** Ask for all events after the last one that was understood. */
  sync() { this.send({ type: "sync", after: this.last }); }
}
