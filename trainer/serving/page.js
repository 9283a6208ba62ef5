"use strict";
// Asks the model what it is, makes a form of it, and shows its answers. Texts go in as text alone, never as HTML.
const find = (id) => document.getElementById(id);
const make = (tag, fields = {}, ...inner) => {
  const element = Object.assign(document.createElement(tag), fields);
  element.append(...inner);
  return element;
};
const MAX_CELLS = 1024;
const MAX_SHOWN = 20;
let model = null;
let readRow = null;

function headers(more = {}) {
  const key = find("key").value;
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

function say(text, isFault = false) {
  find("said").textContent = text;
  find("said").className = isFault ? "fault" : "";
}

function field(label, input) {
  find("row").append(make("label", { htmlFor: input.id, textContent: label }), input);
  return input;
}

function asBase64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.split(",")[1] ?? "");
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

function textForm() {
  const hint = model.kind === "mask" ? `A text with ${model.mask} in it`
    : model.kind === "words" ? "Words, with spaces between" : "A text";
  const area = field(hint, make("textarea", { id: "text", required: true }));
  return async () => model.kind === "words"
    ? { words: area.value.split(/\s+/).filter(Boolean) } : { text: area.value };
}

function tableForm() {
  const inputs = [];
  model.features.forEach((name, index) => {
    const input = make("input", { id: `column-${index}`, type: "number", step: "any" });
    input.required = !model.fills_missing;
    inputs.push([name, field(name, input), true]);
  });
  Object.entries(model.categories).forEach(([name, values], index) => {
    const list = make("datalist", { id: `values-${index}` }, ...values.map((value) => make("option", { value })));
    const input = make("input", { id: `category-${index}` });
    input.setAttribute("list", list.id);
    inputs.push([name, field(name, input), false]);
    find("row").append(list);
  });
  return async () => Object.fromEntries(inputs.map(([name, input, isNumber]) =>
    [name, isNumber ? (input.value === "" ? null : Number(input.value)) : input.value]));
}

function gridForm() {
  const [channels, height, width] = model.image_shape;
  if (channels !== 1 || height * width > MAX_CELLS) return null;
  const pixels = new Array(height * width).fill(0);
  const grid = make("div", { id: "grid", className: width > 16 ? "fine" : "" });
  grid.style.gridTemplateColumns = `repeat(${width}, auto)`;
  const cells = pixels.map((_, index) => make("span", { title: `pixel ${index}` }));
  const paint = (cell) => {
    const index = cells.indexOf(cell);
    if (index < 0) return;
    pixels[index] = model.max_pixel;
    cell.style.background = "#fff";
  };
  grid.append(...cells);
  grid.addEventListener("pointerdown", (event) => { event.preventDefault(); paint(event.target); });
  grid.addEventListener("pointermove", (event) => {
    if (event.buttons) paint(document.elementFromPoint(event.clientX, event.clientY));
  });
  const clear = make("button", { type: "button", id: "clear", textContent: "Clear" });
  clear.addEventListener("click", () => {
    pixels.fill(0);
    cells.forEach((cell) => { cell.style.background = ""; });
  });
  find("row").append(make("p", { textContent: "Draw:" }), grid, clear);
  return async () => ({ pixels: [...pixels] });
}

function fileForm(name, accept) {
  const input = field(`A file (${name})`, make("input", { id: "file", type: "file", accept }));
  return async () => input.files.length ? { [name]: await asBase64(input.files[0]) } : null;
}

function imageForm() {
  const drawn = gridForm();
  const file = model.max_pixel === 255 ? fileForm("image", "image/*") : null;
  return async () => (file && await file()) ?? (drawn ? await drawn() : null);
}

function languageForm() {
  const area = field(model.has_chat ? "A question" : "A text to continue",
    make("textarea", { id: "text", required: true }));
  const max_tokens = Math.min(64, model.max_tokens);
  return async () => model.has_chat
    ? { model: model.name, messages: [{ role: "user", content: area.value }], max_tokens }
    : { model: model.name, prompt: area.value, max_tokens };
}

function show(prediction) {
  const lines = [];
  if ("probabilities" in prediction) {
    const sorted = Object.entries(prediction.probabilities).sort((one, other) => other[1] - one[1]);
    say(`${prediction.class}`);
    lines.push(...sorted.slice(0, MAX_SHOWN));
  } else if ("value" in prediction) {
    say(`${prediction.value}`);
  } else if ("tags" in prediction) {
    say(`${prediction.tags.length} words`);
    lines.push(...prediction.tags.map((tag) => [`${tag.word}: ${tag.tag ?? "not read"}`, tag.probability ?? 0]));
  } else if ("masks" in prediction) {
    say(prediction.text);
    prediction.masks.forEach((candidates, index) => candidates.forEach((candidate) =>
      lines.push([`mask ${index + 1}: ${candidate.token}`, candidate.probability])));
  } else {
    say(JSON.stringify(prediction));
  }
  find("answer").tBodies[0].replaceChildren(...lines.map(([name, probability]) => make("tr", {},
    make("td", { textContent: name }), make("td", {}, make("meter", { value: probability })),
    make("td", { className: "number", textContent: probability.toFixed(4) }))));
}

async function ask(event) {
  event.preventDefault();
  find("answer").tBodies[0].replaceChildren();
  const row = await readRow();
  if (row === null) return say("Give a row first.", true);
  const isLanguage = model.kind === "language";
  const path = !isLanguage ? "/predict" : model.has_chat ? "/v1/chat/completions" : "/v1/completions";
  const body = JSON.stringify(isLanguage ? row : { rows: [row] });
  find("as-curl").hidden = body.length > 4000;
  find("curl").textContent =
    `curl ${location.origin}${path} -H 'Content-Type: application/json' -d '${body.replaceAll("'", "'\\''")}'`;
  try {
    const answer = await fetch(path,
      { method: "POST", headers: headers({ "Content-Type": "application/json" }), body });
    const document_ = await answer.json();
    if (!answer.ok) return say(`${answer.status}: ${document_.detail}`, true);
    if (isLanguage) return say(document_.choices[0].message?.content ?? document_.choices[0].text);
    show(document_.predictions[0]);
  } catch (error) {
    say(`There was no answer: ${error.message}`, true);
  }
}

async function begin() {
  const answer = await fetch("/model", { headers: headers() });
  if (answer.status === 401) {
    find("key-line").hidden = false;
    return say("This server needs a key.", find("key").value !== "");
  }
  model = await answer.json();
  say("");
  find("about").textContent = `${model.task}, step ${model.step}` +
    (model.classes.length ? `; classes ${model.classes.slice(0, MAX_SHOWN).join(", ")}` : "");
  find("row").replaceChildren();
  readRow = { table: tableForm, image: imageForm, language: languageForm, audio: () => fileForm("audio", "audio/*") }[
    model.kind]?.() ?? textForm();
  find("row").append(make("p", {}, make("button", { id: "ask", textContent: "Ask" })));
}

find("row").addEventListener("submit", ask);
find("use-key").addEventListener("click", begin);
begin();
