// The page: read its data, draw the map at once, and unpack the vectors after that.

import { render } from "preact";
import { restore } from "./address";
import { CellPanel } from "./cell";
import { readAbout, readArrays, readVectors } from "./data";
import { find } from "./format";
import { Genes } from "./genes";
import { Group } from "./group";
import { Types } from "./legend";
import { Page, TABS } from "./page";
import { Header, Help, listenForKeys } from "./tools";
import { Choice, Swatch } from "./widgets";
import { serve } from "./worker";
import { YourCells } from "./yours";

async function start(): Promise<void> {
  const about = readAbout();
  const { hash, search } = location; // the hash follows the view from now on
  document.title = `${about.title} – Fractal explorer`;
  const page: Page = new Page(about, await readArrays(), () => draw(page));
  Object.assign(window, { explorer: page }); // for the browser's console, and the tests
  render(<Help page={page} />, find("#help"));
  listenForFiles(page);
  listenForKeys(page);
  const slider = find<HTMLInputElement>("#slider");
  slider.addEventListener("input", () => page.setPrefix(Number(slider.value), false));
  slider.addEventListener("change", () => page.setPrefix(Math.round(Number(slider.value))));
  addEventListener("hashchange", () => restore(page, { hash: location.hash, search: "" }));
  draw(page);
  page.map.resize();
  restore(page, { hash, search });
  page.map.drawNow();
  performance.mark("map"); // the cells are drawn
  // Let the browser show the map before the vectors, which are a hundred times larger, are unpacked.
  await new Promise((resolve) => setTimeout(resolve, 30));
  page.update({ vectors: await readVectors(about) });
  document.documentElement.dataset.ready = "true";
  performance.mark("ready");
}

function draw(page: Page): void {
  render(<Header page={page} />, find("header"));
  render(<Stops page={page} />, find("#stops"));
  render(<Aside page={page} />, find("aside"));
  render(<Tip page={page} />, find("#tip"));
  render(<SecondStops page={page} />, find("#stops2"));
  for (const id of ["#points", "#points2"]) find(id).className = page.map.isDrawing ? "lasso" : page.tip ? "over" : "";
}

function Aside({ page }: { page: Page }) {
  const panels = { types: Types, genes: Genes, cell: CellPanel, group: Group, yours: YourCells };
  return (
    <>
      <nav role="tablist">
        {Object.entries(TABS).map(([id, text]) => (
          <button
            id={`tab-${id}`} role="tab" aria-controls={id} aria-selected={page.tab === id} onClick={() => page.update({ tab: id })}
          >
            {text}
          </button>
        ))}
      </nav>
      {Object.entries(panels).map(([id, Panel]) => (
        <section id={id} role="tabpanel" aria-labelledby={`tab-${id}`} hidden={page.tab !== id}>
          {page.tab === id && <Panel page={page} />}
        </section>
      ))}
    </>
  );
}

/** Buttons below the slider, and what the prefix is. */
function Stops({ page }: { page: Page }) {
  const { blocks, widths } = page.about;
  const last = widths.length;
  const stops = blocks.map((block, i) => (
    <button aria-pressed={page.stop === i + 1} onClick={() => page.setPrefix(i + 1)}>
      {block} <small>{page.prefixName(i + 1)}</small>
    </button>
  ));
  const what = page.stop === last ? "All" : `Prefix ${page.stop}: the first ${widths[page.stop - 1]} of the`;
  return (
    <>
      <div>{stops}</div>
      <p class="note">{what} {widths[last - 1]} numbers of each cell. {page.stop < last && `The next block adds the ${blocks[page.stop]}.`}</p>
    </>
  );
}

/** What the second map shows. */
function SecondStops({ page }: { page: Page }) {
  if (!page.second || !page.isSecondShown) return null;
  return (
    <>
      Beside it:{" "}
      <Choice
        id="beside" aria-label="the second map" value={Math.round(page.second.prefix)} options={page.secondMaps}
        choose={(prefix) => page.showSecond(Number(prefix))}
      />
    </>
  );
}

/** The cell that the pointer is at. */
function Tip({ page }: { page: Page }) {
  if (!page.tip) return null;
  const { title, name, colour, lines } = page.describe(page.tip.hit);
  const { x, y } = page.tip;
  const move = (tip: HTMLElement | null) => {
    if (!tip) return;
    const free = find("#views").clientWidth - tip.offsetWidth - 8;
    tip.style.left = `${Math.max(8, Math.min(x + 14, free))}px`;
    tip.style.top = `${Math.max(8, y - tip.offsetHeight - 10)}px`;
  };
  return (
    <div ref={move}>
      <b><Swatch colour={colour} />{name}</b>
      <span>{title}</span>
      {lines.slice(1, 5).map(([name, value]) => <span>{name}: {value}</span>)}
    </div>
  );
}

function listenForFiles(page: Page): void {
  const sign = find("#drop-here");
  addEventListener("dragover", (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    sign.hidden = false;
  });
  addEventListener("dragleave", (event) => (sign.hidden ||= !event.relatedTarget));
  addEventListener("drop", (event) => {
    event.preventDefault();
    sign.hidden = true;
    const file = event.dataTransfer?.files[0];
    if (file) void page.take(file);
  });
}

function fail(error: unknown): never {
  const message = find("#message");
  message.hidden = false;
  message.textContent = `This page can't be shown: ${error instanceof Error ? error.message : String(error)}`;
  throw error;
}

if (globalThis.document) start().catch(fail);
else serve(); // workers run the page's script as well
