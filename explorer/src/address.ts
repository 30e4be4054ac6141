// The view in the part of the address behind #, which no server is ever sent.

import { isTab, type Page } from "./page";

const MOST = 300; // cells of a group that an address lists

export function addressOf(page: Page): string {
  const { map, cell, selection } = page;
  const [zoom, x, y] = map.camera.view;
  const list = (numbers: number[]) => numbers.map((value) => value.toFixed(3)).join(",");
  const rows = selection?.rows[0] ?? [];
  const parts: Record<string, string | number | null> = {
    prefix: Number(map.prefix.toFixed(2)),
    colour: page.colour === "prefix" ? null : page.colour,
    type: page.ticked.size ? [...page.ticked].join(",") : null,
    cell: cell && !cell.layer ? cell.row : null,
    view: zoom === 1 && Math.hypot(x, y) < 1e-3 ? null : list([zoom, x, y]),
    lasso: map.lasso ? list([map.lassoAt, ...map.lasso]) : null,
    cells: !map.lasso && rows.length && rows.length <= MOST ? rows.join(",") : null,
    second: page.isSecondShown ? Math.round(page.second!.prefix) : null,
    tab: page.tab === "types" ? null : page.tab,
  };
  const set = Object.entries(parts).filter(([, value]) => value !== null);
  return `#${new URLSearchParams(set as [string, string][])}`;
}

/** Bring back the view of an address. What can't be read has its default: anybody may have written it. */
export function restore(page: Page, { hash, search }: { hash: string; search: string }): void {
  if (hash === addressOf(page)) return;
  const { cells, tree, map } = page;
  const parts = new URLSearchParams(hash.slice(1));
  const numbers = (name: string, isRight: (n: number) => boolean) => {
    const values = (parts.get(name) ?? "").split(",").map(Number);
    return parts.has(name) && values.every(Number.isFinite) && isRight(values.length) ? values : null;
  };
  const indices = (name: string, below: number) =>
    (numbers(name, () => true) ?? []).filter((value) => Number.isInteger(value) && value >= 0 && value < below);
  const lasso = numbers("lasso", (n) => n >= 7 && n % 2 === 1 && n < 1000); // the prefix at which it was drawn, corners
  if (lasso) page.setPrefix(lasso[0], false);
  page.select(lasso && lasso.slice(1));
  page.setPrefix(numbers("prefix", (n) => n === 1)?.[0] ?? page.firstPrefix, false);
  page.openTree();
  map.camera.look((numbers("view", (n) => n === 3) as [number, number, number] | null) ?? [1, 0, 0]);
  page.colourBy(parts.get("colour") ?? "prefix");
  const [row] = indices("cell", cells.node.length);
  page.choose(row === undefined ? null : { layer: 0, row });
  const listed = indices("cells", cells.node.length);
  const named = (new URLSearchParams(search).get("cells") ?? "").split(",").filter(Boolean);
  if (named.length && !lasso) page.selectNamed(named);
  else if (listed.length && !lasso) page.selectCells([listed, []], "cells of the address");
  const [second] = indices("second", cells.layouts.length + 1);
  page.showSecond(second || null);
  const most = page.column ? (page.column.values?.length ?? 0) + 1 : tree.nodes.length;
  const least = page.column ? 0 : 1 - most; // -5: the cells that stop at node 5
  const ticked = (numbers("type", () => true) ?? []).filter((n) => Number.isInteger(n) && n >= least && n < most);
  if (!page.column) for (const n of ticked) for (const above of tree.above(Math.abs(n))) page.unfolded.add(above);
  const tab = parts.get("tab");
  page.tab = isTab(tab) ? tab : named.length ? "group" : "types";
  page.tick(ticked);
}
