"""Write data/cl-slim.obo: the whole Cell Ontology (CL), release 2025-07-30, without its definitions.

    uv run --no-dev --only-group ontology python data/make_cl_slim.py

The source is the PyPI package cellxgene-ontology-guide 1.11.1 (MIT), which carries CL as JSON; CL itself is
CC-BY 4.0 (see data/README.md). Kept per term: id, name, synonyms, is_a; of obsolete terms also the flag and what took
their place (replaced_by, consider). The source gives every ancestor with its distance, so distance 1 is an is_a
parent; it gives no scope for synonyms, so none is written.
"""

from pathlib import Path

from cellxgene_ontology_guide.supported_versions import load_ontology_file

RELEASE = "2025-07-30"
HEADER = f"""\
format-version: 1.2
data-version: cl/releases/{RELEASE}
ontology: cl
remark: Cell Ontology (CL), release {RELEASE}, by the OBO Foundry's Cell Ontology editors, licensed CC-BY 4.0.
remark: Slimmed by data/make_cl_slim.py: id, name, synonyms without scope, is_a, obsolete flag and what replaced a term.
"""


def main() -> None:
    terms = load_ontology_file(f"CL-ontology-v{RELEASE}.json.zst")
    out = [HEADER]
    for term_id, term in sorted(terms.items()):
        lines = ["[Term]", f"id: {term_id}", f"name: {term['label']}"]
        for synonym in sorted(set(term.get("synonyms", ()))):
            quoted = synonym.replace("\\", "\\\\").replace('"', '\\"')
            lines.append(f'synonym: "{quoted}" []')
        parents = sorted(a for a, distance in term["ancestors"].items() if distance == 1)
        lines += [f"is_a: {p} ! {terms[p]['label']}" for p in parents]
        if term["deprecated"]:
            lines.append("is_obsolete: true")
            if "replaced_by" in term:
                lines.append(f"replaced_by: {term['replaced_by']}")
            # The source spells some of these as "obo.CL_0011026".
            considered = (other.removeprefix("obo.").replace("_", ":") for other in term.get("consider", ()))
            lines += [f"consider: {other}" for other in sorted(considered)]
        out.append("\n".join(lines) + "\n")
    target = Path(__file__).with_name("cl-slim.obo")
    target.write_text("\n".join(out), encoding="utf-8", newline="\n")
    print(f"{target}: CL {RELEASE}, {len(terms):,} terms, {target.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
