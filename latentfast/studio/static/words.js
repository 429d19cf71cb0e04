// The words of the prompt: pressed ones confine the chosen edit, or only show where the model looks for them.

const $ = (id) => document.getElementById(id);
const same = (one, other) => one[0] === other[0] && one[1] === other[1];

export class Words {
  constructor({ send }) {
    this.send = send;
    this.words = [];
    this.looked = []; // without a chosen edit
    this.layer = null;
    this.asked = "";
  }

  show(words, note) {
    const key = JSON.stringify(words);
    this.note = note;
    if (key !== JSON.stringify(this.words)) {
      this.words = words;
      this.looked = this.looked.filter((word) => words.some((other) => same(word, other)));
      $("words").replaceChildren(
        ...words.map((word) => {
          const button = document.createElement("button");
          button.type = "button";
          button.textContent = word[0];
          button.onclick = () => this.press(word);
          return button;
        }),
      );
    }
    this.mark();
  }

  choose(layer) {
    this.layer = layer;
    this.mark();
  }

  get pressed() {
    return this.layer ? this.layer.words : this.looked;
  }

  press(word) {
    const is = this.pressed.some((other) => same(word, other));
    const words = is ? this.pressed.filter((other) => !same(word, other)) : [...this.pressed, word];
    if (this.layer) this.send({ type: "confine", id: this.layer.id, words });
    else {
      this.looked = words;
      this.mark();
    }
  }

  mark() {
    [...$("words").children].forEach((button, index) => {
      button.setAttribute("aria-pressed", String(this.pressed.some((word) => same(word, this.words[index]))));
    });
    $("words-for").textContent = this.words.length === 0
      ? this.note || "Words of the prompt appear here once its clip is made."
      : this.layer
        ? `“${this.layer.label}” acts ${this.layer.words.length ? "where the model looks for the marked words" : "everywhere: click words to confine it"}.`
        : "Click words to see where the model looks for them; choose an edit to confine it to words.";
    const key = JSON.stringify(this.pressed);
    if (key !== this.asked) {
      this.asked = key;
      this.send({ type: "look", words: this.pressed });
    }
  }

  // After a new connection, which has not been asked for anything.
  again() {
    this.asked = "";
    this.mark();
  }
}
