// The list of edits: sliders, switches, order. What it shows is what the server says, but for the slider in the hand.

const $ = (id) => document.getElementById(id);

export class Stack {
  constructor({ send, chosen }) {
    this.send = send;
    this.tell = chosen;
    this.items = new Map(); // id -> its <li>
    this.layers = [];
    this.choice = null;
    this.held = null; // the id of the slider that is being moved
    this.dragged = null;
  }

  get layer() {
    return this.layers.find(({ id }) => id === this.choice) ?? null;
  }

  show(layers) {
    const before = new Set(this.items.keys());
    const fresh = layers.filter(({ id }) => !before.has(id));
    this.layers = layers;
    const list = $("stack");
    layers.forEach((layer, index) => {
      const item = this.items.get(layer.id) ?? this.make(layer.id);
      if (list.children[index] !== item) this.place(list, item, index);
      this.fill(item, layer);
      before.delete(layer.id);
    });
    for (const id of before) {
      this.items.get(id).remove();
      this.items.delete(id);
    }
    $("empty").hidden = layers.length > 0;
    if (fresh.length === 1 && this.started) this.choose(fresh[0].id);
    else if (this.choice !== null && !this.layer) this.choose(null);
    this.started = true;
    this.tell(this.layer);
  }

  // Moving a node takes the focus from it.
  place(list, item, index) {
    const focused = item.contains(document.activeElement) ? document.activeElement : null;
    list.insertBefore(item, list.children[index] ?? null);
    focused?.focus({ preventScroll: true });
  }

  make(id) {
    const item = $("layer").content.firstElementChild.cloneNode(true);
    const part = (name) => item.querySelector(`.${name}`);
    this.items.set(id, item);
    item.dataset.id = id;
    part("on").onchange = ({ target }) => this.send({ type: "switch", id, on: target.checked });
    part("name").onclick = () => this.choose(this.choice === id ? null : id);
    part("remove").onclick = () => {
      const next = item.nextElementSibling ?? item.previousElementSibling;
      this.send({ type: "remove", id });
      (next?.querySelector(".name") ?? $("kinds").querySelector("button"))?.focus();
    };
    const slider = part("slider");
    slider.oninput = () => {
      this.held = id;
      part("amount").textContent = written(slider);
      this.send({ type: "amount", id, amount: Number(slider.value), live: true, stamp: performance.now() });
    };
    slider.onchange = () => {
      this.held = null;
      this.send({ type: "amount", id, amount: Number(slider.value), live: false, stamp: performance.now() });
    };
    slider.onpointerdown = () => this.choose(id);
    const grip = part("grip");
    grip.onkeydown = (event) => {
      const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const to = this.index(id) + step;
      if (to >= 0 && to < this.layers.length) this.send({ type: "move", id, to });
    };
    grip.ondragstart = (event) => {
      this.dragged = id;
      event.dataTransfer.effectAllowed = "move";
      event.dataTransfer.setData("text/plain", part("name").textContent);
      event.dataTransfer.setDragImage(item, 20, 20);
    };
    grip.ondragend = () => { this.dragged = null; };
    item.ondragover = (event) => {
      if (this.dragged === null) return;
      event.preventDefault();
      item.classList.add("over");
    };
    item.ondragleave = () => item.classList.remove("over");
    item.ondrop = (event) => {
      item.classList.remove("over");
      if (this.dragged === null) return;
      event.preventDefault();
      if (this.dragged !== id) this.send({ type: "move", id: this.dragged, to: this.index(id) });
      this.dragged = null;
    };
    return item;
  }

  fill(item, layer) {
    const part = (name) => item.querySelector(`.${name}`);
    const slider = part("slider");
    Object.assign(slider, { min: layer.low, max: layer.high, step: layer.step });
    if (this.held !== layer.id) {
      slider.value = layer.amount;
      part("amount").textContent = written(slider);
    }
    slider.setAttribute("aria-label", `${layer.label}: how much`);
    part("name").textContent = layer.label;
    part("on").checked = layer.on;
    part("on").setAttribute("aria-label", `${layer.label}: on`);
    part("grip").setAttribute("aria-label", `${layer.label}: move up or down`);
    part("remove").setAttribute("aria-label", `${layer.label}: remove`);
    item.classList.toggle("off", !layer.on);
    part("where").textContent = layer.problem ?? layer.where;
    part("where").classList.toggle("problem", Boolean(layer.problem));
  }

  choose(id) {
    this.choice = id;
    for (const [key, item] of this.items) {
      item.classList.toggle("chosen", key === id);
      item.querySelector(".name").setAttribute("aria-pressed", String(key === id));
    }
    this.tell(this.layer);
  }

  index(id) {
    return this.layers.findIndex((layer) => layer.id === id);
  }
}

const written = (slider) => Number(slider.value).toFixed(2);
