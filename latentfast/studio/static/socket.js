// The connection: JSON both ways, frames from the server; it comes back by itself when it was lost.

const token = new URLSearchParams(location.search).get("token") ?? "";

export const address = (path) => `${path}?token=${encodeURIComponent(token)}`;

export class Connection {
  constructor({ message, packet, status }) {
    this.listeners = { message, packet, status };
    this.wait = 250;
    this.open();
  }

  open() {
    const url = new URL(address("ws"), location.href);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    this.socket = new WebSocket(url);
    this.socket.binaryType = "arraybuffer";
    this.socket.onopen = () => {
      this.wait = 250;
      this.listeners.status(true, "");
    };
    this.socket.onmessage = ({ data }) => {
      if (typeof data === "string") this.listeners.message(JSON.parse(data));
      else this.listeners.packet(...unpack(data));
    };
    this.socket.onclose = ({ code, reason }) => {
      this.listeners.status(false, reason);
      if (code === 4403) return; // a wrong token does not get right by itself
      setTimeout(() => this.open(), this.wait);
      this.wait = Math.min(8000, this.wait * 2);
    };
  }

  send(message) {
    if (this.socket.readyState !== WebSocket.OPEN) return false;
    this.socket.send(JSON.stringify(message));
    return true;
  }
}

// A packet is the length of its header (4 bytes, little-endian), the header as JSON, and the frames.
function unpack(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  return [header, new Uint8Array(buffer, 4 + length)];
}
