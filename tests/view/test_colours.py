"""One colour per family of types, and shades of it below."""

from fractal.view.colours import colours_of, to_oklch


def test_shades_of_a_family_have_its_hue():
    paths = [("Immune", "Lymphoid", f"T{i}") for i in range(5)] + [
        ("Immune", "Myeloid", "M"),
        ("Muscle", "Smooth", "S"),
    ]
    colours = colours_of(paths)
    assert colours["Muscle",] == colours["Muscle", "Smooth", "S"]
    hues = [to_oklch(colours[path])[2] for path in paths if path[0] == "Immune"]
    assert max(hues) - min(hues) < 60
    assert len({colours[path] for path in paths}) == len(paths)
    assert colours_of([p for p in paths if p[0] == "Immune"])["Immune", "Myeloid"] != colours["Immune", "Myeloid"]
