// The tab "Genes": how many cells of each type express a gene, and how much, as dots; a click colours by the gene.

import { extent, mean, rollup } from "d3-array";
import { ramp } from "./colours";
import { downloadCsv, fileName } from "./download";
import { count, percent } from "./format";
import { memo, type Page } from "./page";

const MOST = 40; // types that are shown

type Dots = ReturnType<typeof dotsOf>;

const remembered = memo<Dots>();

/**
 * The largest types of a level, as nodes, of `all`; and per gene and type the share of the cells that express it, and the
 * mean of all of them.
 */
function dotsOf({ cells, counts, tree }: Page, level: number) {
  const nodes = tree.nodes.map((_, node) => node).filter((node) => tree.depth(node) === level && counts[node] > 0);
  const largest = new Set([...nodes].sort((a, b) => counts[b] - counts[a]).slice(0, MOST));
  const types = nodes.filter((node) => largest.has(node));
  const rowsOf = rollup([...cells.node.keys()], (rows) => rows, (row) => tree.at(cells.node[row], level));
  const genes = cells.columns.filter(({ unit }) => unit);
  const rows = genes.map((gene) => {
    const values = types.map((type) => (rowsOf.get(type) ?? []).map((row) => gene.codes[row]));
    const dots = values.map((ofType) => ({ share: mean(ofType, (value) => Number(value > 0)) ?? 0, mean: mean(ofType) ?? 0 }));
    return { gene, dots };
  });
  return { types, all: nodes.length, rows };
}

export function Genes({ page }: { page: Page }) {
  const { about, tree } = page;
  const level = page.level ?? page.levelOf(page.stop);
  const { types, all, rows } = remembered([level], () => dotsOf(page, level));
  if (!rows.length) {
    return <p class="empty">This page was made without genes. Whoever made it can add them: <code>fractal explore --genes</code>, of a file with counts.</p>;
  }
  const title = about.levels[level - 1];
  const save = () => {
    const lines = rows.flatMap(({ gene, dots }) => dots.map((dot, i) => [gene.name, tree.path(types[i]), dot.share, dot.mean]));
    downloadCsv(fileName(about.title, "genes.csv"), ["gene", title, "share of cells", "mean"], lines);
  };
  return (
    <>
      <p class="note">
        By {title}{all > types.length && `, the ${types.length} largest of ${count(all)}`}. Size: the share of the cells that
        express the gene; colour: their mean, from the lowest to the highest of the row ({rows[0].gene.unit}).
      </p>
      <p class="buttons"><button id="save-genes" onClick={save}>Download as CSV</button></p>
      <div class="wide" tabIndex={0} role="region" aria-label="Genes by type">
        <table class="dots">
          <thead><tr><td />{types.map((type) => <th scope="col" title={tree.path(type)}><span>{tree.name(type)}</span></th>)}</tr></thead>
          <tbody>{rows.map(({ gene, dots }) => <Row {...{ page, gene, dots }} names={types.map((type) => tree.name(type))} />)}</tbody>
        </table>
      </div>
    </>
  );
}

function Row({ page, gene, dots, names }: { page: Page; names: string[] } & Dots["rows"][0]) {
  const [low, high] = extent(dots, (dot) => dot.mean) as [number, number];
  const id = `gene:${gene.name}`;
  const isShown = page.colour === id;
  return (
    <tr>
      <th scope="row">
        <button aria-pressed={isShown} onClick={() => page.colourBy(isShown ? "prefix" : id)}>{gene.name}</button>
      </th>
      {dots.map(({ share, mean }, i) => {
        const [size, backgroundColor] = [`${14 * Math.sqrt(share)}px`, ramp((mean - low) / (high - low || 1))];
        const text = `${gene.name} in ${names[i]}: ${percent(share)} of the cells, mean ${mean.toFixed(2)}`;
        return <td title={text}><i style={{ width: size, height: size, backgroundColor }} /></td>;
      })}
    </tr>
  );
}
