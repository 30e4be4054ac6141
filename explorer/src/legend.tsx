// The tab "Types": what colours the cells, and its legend. Pointing at a row lights its cells up.

import type { ComponentChildren } from "preact";
import { RAMP } from "./colours";
import type { CellColumn } from "./data";
import { count } from "./format";
import { Mode } from "./group";
import { type Page, valueOf } from "./page";
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
      {page.ticked.size > 0 && (
        <p class="buttons">
          <Mode page={page} />
          <button onClick={() => page.selectTicked()}>Select cells {page.ticks}</button>
        </p>
      )}
    </>
  );
}

interface TreeProps {
  page: Page;
  matches: Map<number, string> | null; // of the search: nodes, and the name, id or synonym that matched
  childrenOf: (node: number) => number[]; // those that have cells, or that lead to a match
}

function TreeLegend({ page, matches }: Omit<TreeProps, "childrenOf">) {
  const isFound = (node: number) => [...matches!.keys()].some((match) => page.tree.isBelow(match, node));
  const childrenOf = matches ? (node: number) => page.tree.children[node].filter(isFound) : page.childrenOf;
  if (matches?.size === 0) return <p class="empty">no such type</p>;
  return (
    <div id="tree" role="tree" onPointerLeave={() => page.hover(null)}>
      <Below {...{ page, matches, childrenOf }} node={0} />
    </div>
  );
}

/** What is below a node, and as the last row the cells that stop at it: the counts add up to those of the node. */
function Below({ page, matches, childrenOf, node }: TreeProps & { node: number }) {
  const { counts, tree } = page;
  const children = childrenOf(tree.chain(node, childrenOf).at(-1)!);
  const stopped = counts[node] - children.reduce((sum, child) => sum + counts[child], 0);
  const name = node ? `no answer at the ${page.levelBelow(node)}` : tree.name(0);
  return (
    <>
      {children.map((child) => <Branch {...{ page, matches, childrenOf }} node={child} />)}
      {stopped > 0 && !matches && <Row page={page} value={-node} name={name} cells={stopped} />}
    </>
  );
}

/** A node and those below it. A name that repeats the only one above it stands once. */
function Branch({ page, matches, childrenOf, node }: TreeProps & { node: number }) {
  const { tree, counts, unfolded } = page;
  const { name, id, synonyms } = tree.nodes[node];
  const end = tree.chain(node, childrenOf).at(-1)!;
  const hasMore = childrenOf(end).length > 0;
  const isOpen = hasMore && (matches !== null || unfolded.has(end));
  const by = matches?.get(node);
  const act = matches ? () => page.showType(node) : hasMore ? () => page.fold(node, isOpen) : undefined;
  return (
    <div class="branch" role="treeitem" aria-expanded={hasMore ? isOpen : undefined}>
      <Row
        page={page} value={node} name={page.label(node)} cells={counts[node]} act={act}
        mark={hasMore ? (isOpen ? "▾" : "▸") : ""}
        title={[tree.path(node), id, synonyms.slice(0, 6).join("; ")].filter(Boolean).join("\n")}
      >
        {by && <small>{[...new Set([by, id])].filter((text) => text !== name).join(" · ")}</small>}
      </Row>
      {isOpen && <div class="below" role="group"><Below {...{ page, matches, childrenOf, node }} /></div>}
    </div>
  );
}

interface RowProps {
  page: Page;
  value: number; // as in `ticked`
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
      <input type="checkbox" aria-label={`keep ${page.nameOf(value)} lit up`} checked={isTicked} onChange={tick} />
      <button class="name" title={title} onClick={act ?? tick}>
        <span class="fold">{mark}</span>
        <Swatch colour={colour ?? page.tree.nodes[Math.abs(value)].colour} isRing={value < 0} />
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
  return (
    <div id="values" onPointerLeave={() => page.hover(null)}>
      {codes.map((code) => (
        <Row
          page={page} value={code} name={valueOf(column, code)} cells={cells[code]} colour={page.colourOf(column, code)}
          title={column.explained?.[code - 1]}
        />
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
