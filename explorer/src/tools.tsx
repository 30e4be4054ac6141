// Title and tools above the map, the keys, and the help that lists them.

import { STATUSES, statusTexts } from "./annotator";
import { count, find } from "./format";
import type { Page } from "./page";
import { savePicture } from "./picture";
import { Facts } from "./widgets";

interface Action {
  key: string;
  title: string;
  act: (page: Page) => void;
  tool?: [string, string]; // id and text of its button
}

const ACTIONS: Action[] = [
  { key: "/", title: "find a type", act: findType },
  { key: "c", title: "colour by the next level or column", act: nextColour },
  { key: "l", title: "draw around cells; or Shift and drag", act: (page) => page.lassoMode(), tool: ["lasso", "Lasso"] },
  { key: "v", title: "a second map, at another prefix or of the raw vectors", act: secondMap, tool: ["second", "Two maps"] },
  { key: "+", title: "closer", act: (page) => page.map.camera.zoomBy(1.5) },
  { key: "-", title: "farther", act: (page) => page.map.camera.zoomBy(1 / 1.5) },
  { key: "0", title: "the whole map", act: (page) => page.map.camera.look([1, 0, 0], true), tool: ["reset", "Whole map"] },
  { key: "s", title: "save the map as a picture", act: savePicture, tool: ["png", "PNG"] },
  { key: "k", title: "copy the address of this view", act: copyLink, tool: ["link", "Link"] },
  { key: "d", title: "light or dark", act: toggleTheme, tool: ["theme", "◐"] },
  { key: "?", title: "help", act: () => find<HTMLDialogElement>("#help").showModal(), tool: ["help", "?"] },
  { key: "Escape", title: "let go: lasso, cell, group, type", act: (page) => page.clear() },
];

function findType(page: Page): void {
  page.update({ tab: "types" });
  find("#search").focus();
}

function nextColour(page: Page): void {
  const ids = [...page.colourings.keys()].filter((id) => !id.startsWith("gene:"));
  page.colourBy(ids[(ids.indexOf(page.colour) + 1) % ids.length]);
}

function secondMap(page: Page): void {
  const last = page.cells.layouts.length; // the raw vectors, where their map is here
  const other = page.stop === last ? 1 : last;
  page.showSecond(page.isSecondShown ? null : other);
}

async function copyLink(): Promise<void> {
  const button = find("#tool-link");
  // A page from disk may not write to the clipboard.
  const isCopied = await navigator.clipboard.writeText(location.href).then(() => true, () => false);
  button.textContent = isCopied ? "Copied" : "See the address bar";
  setTimeout(() => (button.textContent = "Link"), 1500);
}

function toggleTheme(page: Page): void {
  const { style } = document.documentElement;
  const isDark = style.colorScheme === "dark" || (!style.colorScheme && matchMedia("(prefers-color-scheme: dark)").matches);
  style.colorScheme = isDark ? "light" : "dark";
  page.map.draw();
}

export function listenForKeys(page: Page): void {
  addEventListener("keydown", (event) => {
    const { target, key } = event;
    const isText = target instanceof HTMLSelectElement || (target instanceof HTMLInputElement && target.type !== "range");
    if (event.ctrlKey || event.metaKey || event.altKey || isText || find<HTMLDialogElement>("#help").open) return;
    const step = { ArrowRight: 1, ArrowLeft: -1 }[key];
    const prefix = step ? page.stop + step : Number(key) || 0;
    const action = ACTIONS.find((other) => other.key === (key === "=" ? "+" : key));
    if (prefix >= 1 && prefix <= page.about.widths.length) page.setPrefix(prefix);
    else if (action) action.act(page);
    else return;
    event.preventDefault();
  });
}

export function Header({ page }: { page: Page }) {
  const { title, cells, total, known, reference } = page.about;
  const of = total > cells ? ` of ${count(total)}` : "";
  return (
    <>
      <div id="title">
        <h1>{title}</h1>
        <p>{count(cells)}{of} cells, {known ? "labels of the file" : `labels by ${reference}`}</p>
      </div>
      <div id="tools" role="toolbar" aria-label="Tools">
        {ACTIONS.map(({ key, title, act, tool }) => tool && (
          <button
            id={`tool-${tool[0]}`} title={`${title} (${key})`} aria-label={`${tool[1]}: ${title}`}
            aria-pressed={{ l: page.map.isDrawing, v: page.isSecondShown }[key]} onClick={() => act(page)}
          >
            {tool[1]}
          </button>
        ))}
      </div>
    </>
  );
}

export function Help({ page }: { page: Page }) {
  const keys = ACTIONS.map(({ key, title }): [string, string] => [key.toUpperCase(), title]);
  const { annotator, blocks, levels } = page.about;
  const answers: [string, string][] = [
    ["●", "labelled at the level that colours; a grey one has no label at all"],
    ["○", "its answer stops at a level above, whose colour it has"],
    ["◆", "novel"],
    ["no answer", `the probability of the level is below ${annotator.confidence}, the black line on its bar, or the cell is unusual`],
    ["best guess", `the likeliest ${levels.at(-1)}, however unsure`],
    ["p-value", "the share of the cells the reference was checked with that fit its types as badly"],
    ...statusTexts(page.about).map((text, i): [string, string] => [STATUSES[i], text]),
  ];
  return (
    <>
      <h2>Fractal explorer</h2>
      <p>
        Each cell is one vector of {blocks.length} blocks: {blocks.join(", ")}. A prefix is its first blocks. Move the slider,
        and islands split where the next block adds a level. The maps are drawings: distances between islands mean
        little. Neighbours are exact, computed here from the vectors.
      </p>
      <Facts lines={answers} />
      <Facts lines={[["1, 2, …, ← →", "the prefix"], ...keys, ...Object.entries(page.about.facts)]} />
      <button onClick={() => find<HTMLDialogElement>("#help").close()}>Close</button>
    </>
  );
}
