// Small parts of the panels.

import type { ComponentChildren, ComponentProps } from "preact";
import { count, percent } from "./format";

export const Swatch = ({ colour, isRing = false }: { colour: string; isRing?: boolean }) => (
  <i class={isRing ? "swatch ring" : "swatch"} style={{ [isRing ? "borderColor" : "backgroundColor"]: colour }} />
);

type ChoiceProps = ComponentProps<"select"> & { options: (readonly [string | number, string])[]; choose: (value: string) => void };

export const Choice = ({ options, choose, ...others }: ChoiceProps) => (
  <select {...others} onChange={(event) => choose(event.currentTarget.value)}>
    {options.map(([value, text]) => <option value={value}>{text}</option>)}
  </select>
);

/** A bar of a share, with a mark where the share of all cells is. */
export const Bar = ({ share, colour, mark }: { share: number; colour: string; mark?: number }) => (
  <span class="bar">
    <b style={{ width: `${100 * share}%`, backgroundColor: colour }} />
    {mark !== undefined && <i style={{ left: `${100 * mark}%` }} />}
  </span>
);

/** The share of neighbours with the same label, and the most that it can be. */
export const Same = ({ same, most, colour }: { same: number; most: number; colour: string }) => (
  <>
    <Bar share={same} colour={colour} mark={most < 1 ? most : undefined} />
    <span class="figure">{percent(same)}{most < 1 && ` of at most ${percent(most)}`}</span>
  </>
);

/** Names and values. */
export const Facts = ({ lines }: { lines: [string, string][] }) => (
  <dl>{lines.map(([name, value]) => [<dt>{name}</dt>, <dd>{value}</dd>])}</dl>
);

interface TableProps {
  kind: string;
  caption: string;
  head: string[];
  rows: ComponentChildren[][]; // the first of a row is its heading
}

export const Table = ({ kind, caption, head, rows }: TableProps) => (
  <table class={kind}>
    <caption>{caption}</caption>
    <tr>{head.map((name) => (name ? <th>{name}</th> : <td />))}</tr>
    {rows.map(([name, ...values]) => <tr><th>{name}</th>{values.map((value) => <td>{value}</td>)}</tr>)}
  </table>
);

const SHOWN = 8; // rows of a table

export interface Part {
  name: string;
  colour: string;
  cells: number;
  ofAll: number; // cells on the whole map
}

/** What a group of `size` cells consists of, beside the whole map of `all` cells. */
export function Parts({ title, parts, size, all }: { title: string; parts: Part[]; size: number; all: number }) {
  const sorted = parts.filter(({ cells }) => cells).sort((a, b) => b.cells - a.cells);
  const rest = sorted.slice(SHOWN);
  const rows = sorted.slice(0, SHOWN).map(({ name, colour, cells, ofAll }) => {
    const bar = <Bar share={cells / size} colour={colour} mark={ofAll / all} />;
    return [<>{name}{bar}</>, count(cells), percent(cells / size), percent(ofAll / all)];
  });
  if (rest.length) rows.push([`${count(rest.length)} more`, count(rest.reduce((sum, { cells }) => sum + cells, 0)), "", ""]);
  return <Table kind="parts" caption={title} head={["", "Cells", "Group", "Map"]} rows={rows} />;
}
