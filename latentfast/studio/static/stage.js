// The clip on the screen: played, scrubbed, compared with what it was, with a mask over it.

const $ = (id) => document.getElementById(id);
const canvas = $("canvas");
const context = canvas.getContext("2d", { alpha: false });
const strip = $("strip");
const stripContext = strip.getContext("2d", { alpha: false });

export class Stage {
  constructor() {
    this.clips = new Map(); // "edited", "source", "source exact", "mask" -> Frames
    this.playing = !matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.time = 0;
    this.length = 1;
    this.fps = 16;
    this.before = null; // the time of the last drawing
    this.stale = true;
    this.veil = 1; // how much of a mask is seen
    this.stripAt = 0;
    this.drawn = []; // to be called once the newest frames are on the screen
    new ResizeObserver(() => this.resize()).observe(canvas);
    $("play").onclick = () => this.play(!this.playing);
    $("compare").onclick = () => this.compare($("wipe").hidden);
    $("wipe").oninput = () => { this.stale = true; };
    $("time").oninput = () => {
      this.play(false);
      this.time = Number($("time").value);
      this.stale = true;
    };
    this.play(this.playing);
    requestAnimationFrame((now) => this.tick(now));
  }

  play(on) {
    this.playing = on;
    $("play").textContent = on ? "Pause" : "Play";
    $("play").setAttribute("aria-pressed", String(on));
  }

  compare(on) {
    for (const id of ["wipe", "before", "after"]) $(id).hidden = !on;
    $("compare").setAttribute("aria-pressed", String(on));
    this.stale = true;
  }

  show(name, frames) {
    if (frames === null) this.clips.delete(name);
    else this.clips.set(name, frames);
    const { header } = frames ?? {};
    if (header?.length) {
      // A clip that does not play by itself is shown by its middle.
      if (!this.playing && this.length === 1) this.time = header.length / 2;
      this.length = header.length;
      this.fps = header.fps;
      $("time").max = this.length;
      $("time").value = this.time;
      $("screen").style.setProperty("--shape", header.shape);
    }
    this.stale = true;
    if (name === "edited") this.stripAt = Math.min(this.stripAt, performance.now());
  }

  // While an edit is chosen its effect is what matters, and the mask only says where.
  dim(on) {
    this.veil = on ? 0.55 : 1;
    this.stale = true;
  }

  resize() {
    const scale = Math.min(2, devicePixelRatio || 1);
    for (const one of [canvas, strip]) {
      const width = Math.max(1, Math.round(one.clientWidth * scale));
      const height = Math.max(1, Math.round(one.clientHeight * scale));
      if (one.width !== width || one.height !== height) {
        one.width = width;
        one.height = height;
      }
    }
    this.stale = true;
    this.stripAt = 0;
  }

  tick(now) {
    requestAnimationFrame((next) => this.tick(next));
    const passed = this.before === null ? 0 : now - this.before;
    this.before = now;
    if (this.playing && this.length > 1) {
      this.time = (this.time + (passed / 1000) * this.fps) % this.length;
      $("time").value = this.time;
      this.stale = true;
    }
    if (!this.stale) return;
    this.stale = false;
    this.draw();
    for (const call of this.drawn.splice(0)) call();
    if (now >= this.stripAt) {
      this.drawStrip();
      this.stripAt = now + 400; // while a slider moves, a few times a second are enough
    }
  }

  draw() {
    const { width, height } = canvas;
    const edited = this.clips.get("edited");
    context.imageSmoothingQuality = "high";
    if (!edited) {
      context.fillStyle = "#000";
      context.fillRect(0, 0, width, height);
      return;
    }
    // What is before is shown as what is after is: projected beside projected, decoded beside decoded.
    const source = (edited.header.exact && this.clips.get("source exact")) || this.clips.get("source");
    edited.draw(context, this.time, 0, 0, width, height);
    if (!$("wipe").hidden && source) {
      const thumb = 28 * (width / Math.max(1, canvas.clientWidth)); // the slider's thumb stays inside of it
      const edge = thumb / 2 + (Number($("wipe").value) / 1000) * (width - thumb);
      context.save();
      context.beginPath();
      context.rect(0, 0, edge, height);
      context.clip();
      source.draw(context, this.time, 0, 0, width, height);
      context.restore();
    }
    this.clips.get("mask")?.drawOne(context, this.time, 0, 0, width, height, this.veil);
  }

  drawStrip() {
    const edited = this.clips.get("edited");
    const { width, height } = strip;
    stripContext.fillStyle = "#1a1d23";
    stripContext.fillRect(0, 0, width, height);
    if (!edited) return;
    const count = Math.max(1, Math.round(width / (height * (edited.width / edited.height))));
    for (let i = 0; i < count; i++) {
      const time = ((i + 0.5) / count) * this.length;
      edited.draw(stripContext, time, (i * width) / count, 0, width / count, height);
    }
  }
}
