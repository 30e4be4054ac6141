// The tab "Types": what colours the cells, and its legend. Pointing at a row lights its cells up.

import type { ComponentChildren } from "preact";
import { RAMP } from "./colours";
import type { CellColumn } from "./data";
import { count } from "./format";
import { Select } from "./group";
import type { Page } from "./page";
import { Swatch } from "./widgets";

export function Types({ page }: { page: Page }) {
  const { about, column, tree, query } = page;
  const options = (areGenes: boolean) =>
    [...page.colourings].filter(([id]) => id.startsWith("gene:") === areGenes).map(([id, name]) => <option value={id}>{name}</option>);
  const matches = query ? tree.search(query) : null;
  const press = (event: KeyboardEvent) => {
    const [best] = matches?.keys() ?? [];
    if (event.key === "Enter" && best) page.showType(best);
    if (event.key === "Escape") page.search("");
    if (event.key === "Enter" || event.key === "Escape") (event.currentTarget as HTMLElement).blur();
  };
  return (
    <>
      <input
        id="search" type="search" placeholder="Find a type: name, synonym or CL id" aria-label="Find a type"
        autocomplete="off" spellcheck={false} value={query}
        onInput={(event) => page.search(event.currentTarget.value)} onKeyDown={press}
      />
      <label class="field">
        Colour by
        <select id="colour" value={page.colour} onChange={(event) => page.colourBy(event.currentTarget.value)}>
          {options(false)}
          {about.genes.length > 0 && <optgroup label="Genes">{options(true)}</optgroup>}
        </select>
      </label>
      {!column && <TreeLegend page={page} matches={matches} />}
      {column?.values && <Values page={page} column={column} />}
      {column && !column.values && <Ramp column={column} />}
      {page.ticked.size > 0 && <Select page={page} />}
    </>
  );
}

interface TreeProps {
  page: Page;
  matches: Map<number, string> | null; // of the search: nodes, and the name, id or synonym that matched
}

function TreeLegend({ page, matches }: TreeProps) {
  const { tree, counts } = page;
  if (matches?.size === 0) return <p class="empty">no such type</p>;
  const unlabelled = counts[0] - tree.children[0].reduce((sum, child) => sum + counts[child], 0);
  return (
    <div id="tree" role="tree" onPointerLeave={() => page.hover(null)}>
      {tree.children[0].map((node) => <Branch page={page} matches={matches} node={node} />)}
      {unlabelled > 0 && !matches && <Row page={page} value={0} name={page.cells.answers ? "no answer" : "no label"} cells={unlabelled} />}
    </div>
  );
}

/** A node and those below it. A name that repeats the one above it stands once: its node has no row, or "unspecified". */
function Branch({ page, matches, node, isRest = false }: TreeProps & { node: number; isRest?: boolean }) {
  const { tree, counts, unfolded } = page;
  const { name, id, synonyms } = tree.nodes[node];
  const repeats = tree.repeats(node);
  const below = (tops: number[]) =>
    tops.flatMap((top) => tree.children[top]).filter((child) => !repeats.includes(child) && (matches || counts[child]));
  const sameName = (child: number) => tree.name(child) === name;
  const all = below(repeats);
  const hasMore = all.length > 1 || (all.length === 1 && !sameName(all[0]));
  const children = hasMore ? below(repeats.filter((top) => matches || unfolded.has(top))) : [];
  const isShown = matches ? [...matches.keys()].some((match) => tree.isBelow(match, node)) : counts[node] > 0;
  if (!isShown) return null;
  const isOpen = children.length > 0 && (matches !== null || unfolded.has(node));
  const shallow = counts[node] - all.reduce((sum, child) => sum + counts[child], 0);
  const by = matches?.get(node);
  const act = matches ? () => page.showType(node) : hasMore ? () => page.fold(node, isOpen) : undefined;
  return (
    <div class="branch" role="treeitem" aria-expanded={hasMore ? isOpen : undefined}>
      <Row
        page={page} value={node} name={isRest ? "unspecified" : name} cells={counts[node]} act={act}
        mark={hasMore ? (isOpen ? "▾" : "▸") : ""}
        title={[tree.path(node), id, synonyms.slice(0, 6).join("; ")].filter(Boolean).join("\n")}
      >
        {by && <small>{[...new Set([by, id])].filter((text) => text !== name).join(" · ")}</small>}
      </Row>
      {isOpen && (
        <div class="below" role="group">
          {children.map((child) => <Branch {...{ page, matches }} node={child} isRest={sameName(child)} />)}
          {shallow > 0 && !matches && <p class="note">{count(shallow)} without a deeper label</p>}
        </div>
      )}
    </div>
  );
}

interface RowProps {
  page: Page;
  value: number; // node, or code of the column
  name: string;
  cells: number;
  colour?: string;
  act?: () => void; // of a click on the name; without it, the row is ticked
  mark?: string;
  title?: string;
  children?: ComponentChildren;
}

function Row({ page, value, name, cells, colour, act, mark, title, children }: RowProps) {
  const isTicked = page.ticked.has(value);
  const tick = () => page.tick(isTicked ? [...page.ticked].filter((other) => other !== value) : [...page.ticked, value]);
  return (
    <div
      class={isTicked ? "row ticked" : "row"} onPointerEnter={() => page.hover(value)}
      onFocusIn={() => page.hover(value)} onFocusOut={() => page.hover(null)}
    >
      <input type="checkbox" aria-label={`keep ${name} lit up`} checked={isTicked} onChange={tick} />
      <button class="name" title={title} onClick={act ?? tick}>
        <span class="fold">{mark}</span>
        <Swatch colour={colour ?? page.tree.nodes[value].colour} />
        <span class="text">{name}{children}</span>
        <span class="count">{count(cells)}</span>
      </button>
    </div>
  );
}

/** The values of a text column, most cells first. */
function Values({ page, column }: { page: Page; column: CellColumn }) {
  const cells = new Uint32Array(column.values!.length + 1);
  for (const code of column.codes) cells[code]++;
  const codes = [...cells.keys()].filter((code) => cells[code]).sort((a, b) => cells[b] - cells[a]);
  const name = (code: number) => (code ? column.values![code - 1] : "missing");
  return (
    <div id="values" onPointerLeave={() => page.hover(null)}>
      {codes.map((code) => (
        <Row page={page} value={code} name={name(code)} cells={cells[code]} colour={page.colourOf(column, code)} />
      ))}
    </div>
  );
}

function Ramp({ column }: { column: CellColumn }) {
  const text = (value: number) => value.toLocaleString("en", { maximumSignificantDigits: 4 });
  return (
    <div id="values">
      <div class="ramp" style={{ background: `linear-gradient(90deg, ${RAMP.join(", ")})` }} />
      <p class="ends"><span>{text(column.low!)}</span><span>{column.unit}</span><span>{text(column.high!)}</span></p>
    </div>
  );
}
