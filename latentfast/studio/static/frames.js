// Frames of a clip in one tall canvas, and where in time each of them is.

export class Frames {
  constructor(header, sheet) {
    this.header = header;
    this.sheet = sheet;
    this.width = header.width;
    this.height = header.height;
    this.places = header.places; // of each frame, counted in frames of the finished clip
  }

  static async of(header, bytes) {
    if (header.codec === "gray") return outlined(header, bytes);
    const sheet = new OffscreenCanvas(header.width, header.height * header.places.length);
    const context = sheet.getContext("2d", { alpha: false });
    if (header.codec === "jpeg") {
      let start = 0;
      const pictures = header.sizes.map((size) => new Blob([bytes.subarray(start, (start += size))]));
      const bitmaps = await Promise.all(pictures.map((picture) => createImageBitmap(picture)));
      bitmaps.forEach((bitmap, index) => {
        context.drawImage(bitmap, 0, index * header.height);
        bitmap.close();
      });
    } else {
      const image = context.createImageData(sheet.width, sheet.height);
      const pixels = new Uint32Array(image.data.buffer);
      for (let i = 0, j = 0; i < pixels.length; i++, j += 3) {
        pixels[i] = 0xff000000 | (bytes[j + 2] << 16) | (bytes[j + 1] << 8) | bytes[j];
      }
      context.putImageData(image, 0, 0);
    }
    return new Frames(header, sheet);
  }

  // Draws the frame that is nearest to a time.
  drawOne(context, time, x, y, width, height, alpha) {
    let index = 0;
    this.places.forEach((place, i) => {
      if (Math.abs(place - time) < Math.abs(this.places[index] - time)) index = i;
    });
    context.globalAlpha = alpha;
    context.drawImage(this.sheet, 0, index * this.height, this.width, this.height, x, y, width, height);
    context.globalAlpha = 1;
  }

  // Draws the clip as it is at a time; between two frames that are far apart, both of them.
  draw(context, time, x, y, width, height) {
    const places = this.places;
    let next = places.findIndex((place) => place > time);
    if (next < 0) next = places.length;
    const index = Math.max(0, next - 1);
    const one = (frame, share) => {
      context.globalAlpha = share;
      context.drawImage(this.sheet, 0, frame * this.height, this.width, this.height, x, y, width, height);
    };
    one(index, 1);
    if (next > 0 && next < places.length && places[next] - places[index] > 1.01) {
      const share = (time - places[index]) / (places[next] - places[index]);
      if (share > 0.02) one(next, share);
    }
    context.globalAlpha = 1;
  }
}

const INSIDE = 0x4078c8f2; // alpha, blue, green, red: a quarter of the warm colour
const EDGE = 0xff78c8f2;

// A mask, enlarged, as a tinted region with an outline: what is below stays to be seen.
function outlined(header, bytes) {
  const { width, height, places } = header;
  const scale = Math.max(1, Math.ceil(240 / Math.max(width, height)));
  const [wide, high] = [width * scale, height * scale];
  const small = new OffscreenCanvas(width, height);
  const image = new ImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  const large = new OffscreenCanvas(wide, high);
  const largeContext = large.getContext("2d", { willReadFrequently: true });
  const sheet = new OffscreenCanvas(wide, high * places.length);
  for (let frame = 0; frame < places.length; frame++) {
    for (let i = 0; i < pixels.length; i++) pixels[i] = bytes[frame * pixels.length + i] << 24;
    small.getContext("2d").putImageData(image, 0, 0);
    largeContext.clearRect(0, 0, wide, high);
    largeContext.drawImage(small, 0, 0, wide, high);
    const drawn = largeContext.getImageData(0, 0, wide, high);
    const found = new Uint32Array(drawn.data.buffer);
    const is = Uint8Array.from(found, (pixel) => (pixel >>> 24 >= 128 ? 1 : 0));
    for (let i = 0; i < found.length; i++) {
      const x = i % wide;
      const within = is[i] &&
        (x === 0 || is[i - 1]) && (x === wide - 1 || is[i + 1]) &&
        (i < wide || is[i - wide]) && (i >= found.length - wide || is[i + wide]);
      found[i] = within ? INSIDE : is[i] ? EDGE : 0;
    }
    sheet.getContext("2d").putImageData(drawn, 0, frame * high);
  }
  return new Frames({ ...header, width: wide, height: high }, sheet);
}
