"""Draw a colour emoji font as a folder of captioned pictures, for docs/training.md.

    sudo apt install fonts-noto-color-emoji
    python docs/emoji.py /usr/share/fonts/truetype/noto/NotoColorEmoji.ttf runs/emoji/pictures

Writes one PNG of 128x128 for each character that has a colour glyph of its own, on white, and
metadata.jsonl with its Unicode name in small letters as its caption.
"""

import json
import pathlib
import unicodedata
from collections.abc import Iterator

import tyro
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

SIZE = 128
STRIKE = 109  # the one size at which the font has pictures


def characters(font: pathlib.Path) -> Iterator[str]:
    """The characters that the font draws and that are pictures: no digits, no joiners, no tags."""
    for code in sorted(TTFont(font).getBestCmap() or {}):
        if unicodedata.category(chr(code)) in ("So", "Sm", "Po") and code > 0xFF:
            yield chr(code)


def drawn(character: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """The glyph in the middle of a white square, or None where there is nothing to see."""
    left, top, right, bottom = (int(edge) for edge in font.getbbox(character))
    if right <= left or bottom <= top:
        return None
    glyph = Image.new("RGBA", (right - left, bottom - top))
    ImageDraw.Draw(glyph).text((-left, -top), character, font=font, embedded_color=True)
    glyph.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SIZE, SIZE), "white")
    canvas.alpha_composite(glyph, ((SIZE - glyph.width) // 2, (SIZE - glyph.height) // 2))
    return canvas.convert("RGB")


def main(
    font: tyro.conf.Positional[pathlib.Path], output: tyro.conf.Positional[pathlib.Path]
) -> None:
    """Draw every character of FONT into the folder OUTPUT."""
    output.mkdir(parents=True, exist_ok=True)
    sized, lines = ImageFont.truetype(str(font), STRIKE), []
    for character in characters(font):
        picture = drawn(character, sized)
        if picture is None:
            continue
        name = f"{ord(character):05x}.png"
        picture.save(output / name)
        lines.append({"file_name": name, "text": unicodedata.name(character).lower()})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (output / "metadata.jsonl").write_text(text, encoding="utf-8")
    print(f"{output}: {len(lines)} pictures")


if __name__ == "__main__":
    tyro.cli(main)
