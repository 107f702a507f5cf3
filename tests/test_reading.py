"""What is in a file: encodings, byte order marks, archives, separators, JSON, CSV, TSV, Parquet."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random

import pytest

import dataset
from dataset import DataError

# Article 1 of the Universal Declaration of Human Rights
FRENCH = "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison."
GERMAN = "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sollen einander im Geiste der"
GERMAN += " Brüderlichkeit begegnen. Für Größe und Maß gehören die Rechte über alles."
POLISH = "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw. Są oni obdarzeni"
POLISH += " rozumem i sumieniem i powinni postępować wobec innych w duchu braterstwa."
CZECH = "Všichni lidé rodí se svobodní a sobě rovní co do důstojnosti a práv. Jsou nadáni rozumem a svědomím"
CZECH += " a mají spolu jednat v duchu bratrství."
HUNGARIAN = "Minden emberi lény szabadon születik és egyenlő méltósága és joga van. Az emberek, ésszel és"
HUNGARIAN += " lelkiismerettel bírván, egymással szemben testvéri szellemben kell hogy viseltessenek."
TURKISH = "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. Akıl ve vicdana sahiptirler ve"
TURKISH += " birbirlerine karşı kardeşlik zihniyeti ile hareket etmelidirler."
LITHUANIAN = "Visi žmonės gimsta laisvi ir lygūs savo orumu ir teisėmis. Jiems suteiktas protas ir sąžinė ir"
LITHUANIAN += " jie turi elgtis vienas kito atžvilgiu kaip broliai."
GREEK = "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα. Είναι"
GREEK += " προικισμένοι με λογική και συνείδηση, και οφείλουν να συμπεριφέρονται με πνεύμα αδελφοσύνης."
RUSSIAN = "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и"
RUSSIAN += " совестью и должны поступать в отношении друг друга в духе братства."
UKRAINIAN = "Всі люди народжуються вільними і рівними у своїй гідності та правах. Вони наділені розумом і"
UKRAINIAN += " совістю і повинні діяти у відношенні один до одного в дусі братерства."
HEBREW = "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם. כולם חוננו בתבונה ובמצפון, לפיכך חובה"
HEBREW += " עליהם לנהוג איש ברעהו ברוח של אחווה."
ARABIC = "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق. وقد وهبوا عقلا وضميرا وعليهم أن يعامل بعضهم"
ARABIC += " بعضا بروح الإخاء."
THAI = "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ ต่างมีเหตุผลและมโนธรรม และควรปฏิบัติต่อกัน"
KOREAN = (
    "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 인간은 천부적으로 이성과 양심을"
)
KOREAN += " 부여받았으며 서로 형제애의 정신으로 행동하여야 한다."
JAPANESE = "すべての人間は、生まれながらにして自由であり、 かつ、尊厳と権利とについて平等である。"
JAPANESE += " 人間は、理性と良心とを授けられており、 互いに同胞の精神をもって行動しなければならない。"
CHINESE = "人人生而自由， 在尊严和权利上一律平等。 他们赋有理性和良心， 并应以兄弟关系的精神相对待。"
TAIWANESE = "人人生而自由， 在尊嚴和權利上一律平等。 他們賦有理性和良心， 並應以兄弟關係的精神相對待。"

VOWELS = "صِف خَلقَ خَودِ كَمِثلِ الشَمسِ إِذ بَزَغَت يَحظى الضَجيعُ بِها نَجلاءَ مِعطارِ"

ENCODED = {
    **{"cp1252": FRENCH, "mac_roman": FRENCH, "cp437": GERMAN},
    **{"cp1250": POLISH, "iso8859_2": CZECH, "cp1250 Hungarian": HUNGARIAN},
    **{"cp1254": TURKISH, "cp1257": LITHUANIAN, "cp1253": GREEK, "cp1255": HEBREW, "cp1256": ARABIC},
    **{"cp1256 with vowels": VOWELS, "iso8859_7": GREEK, "iso8859_6": ARABIC},
    **{"cp1251": RUSSIAN, "koi8_r": RUSSIAN, "cp866": RUSSIAN, "iso8859_5": RUSSIAN, "mac_cyrillic": RUSSIAN},
    **{"cp1251 Ukrainian": UKRAINIAN, "koi8_u": UKRAINIAN, "cp874": THAI, "cp949": KOREAN},
    **{"cp932": JAPANESE, "euc_jp": JAPANESE, "gb18030": CHINESE, "big5": TAIWANESE},
}


def sentences(text, size, seed=0):
    """At least `size` bytes of UTF-8 from the words of a text, in lines."""
    generator, words = random.Random(seed), text.split()
    lines = []
    for _ in range(size // len(text.encode()) + 1):
        lines.append(" ".join(generator.choices(words, k=len(words))))
    return "\n".join(lines) + "\n"


def prose(seed, words=40):
    return " ".join(random.Random(seed).choices(FRENCH.split(), k=words))


def read(file, content=None, **how):
    """The documents in a file, and the notes of the TextReader about it."""
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    reader, text = dataset.TextReader(**how), dataset.Text()
    reader.read(file, text)
    return [text[begin:end].decode() for begin, end in text.documents()], list(reader.note_lines())


def error_of(file, content=None, **how):
    """The message of the DataError that reading the file raises, which has two lines."""
    with pytest.raises(DataError) as error:
        read(file, content, **how)
    message = str(error.value)
    assert message.count("\n") == 1 and all(message.split("\n")), message
    return message


# -----------------------------------------------------------------------------
# Encodings


SIZES = [(name, size) for name in ENCODED for size in (3_000, 150_000)]


@pytest.mark.parametrize("name, size", [*SIZES, ("cp1251", 2_500_000), ("gb18030", 2_500_000)])
def test_the_encoding_is_found(tmp_path, name, size):
    encoding, text = name.split()[0], sentences(ENCODED[name], size)
    for content in (text, text.replace("\n", "").replace(" ", "") if name in "cp932 gb18030 big5" else text):
        found, notes = read(tmp_path / "a.txt", content.encode(encoding))
        assert found == [content]
        assert notes == [f"files read as {encoding}: 1 (a.txt)"] or encoding.startswith(("koi8", "iso8859"))


@pytest.mark.parametrize("name", ENCODED)
def test_a_damaged_byte_does_not_change_the_encoding(tmp_path, name):
    encoding = name.split()[0]
    content = sentences(ENCODED[name], 150_000).encode(encoding)
    letters = [at for at, byte in enumerate(content) if byte > 127]
    at = letters[len(letters) // 3]
    for damaged in (content[:at] + b"\xff" + content[at + 1 :], content[letters[0] + 1 :], content[:-2]):
        found = read(tmp_path / "a.txt", damaged)[0]
        assert found == [damaged.decode(encoding, "replace")]
    if name == "cp949":  # in which 0xFF is invalid
        notes = read(tmp_path / "a.txt", content[:at] + b"\xff\n" + content[at:])[1]
        assert "unreadable characters (U+FFFD): 1 (a.txt)" in notes


def test_encodings_of_seven_bits(tmp_path):
    for encoding, text in (("iso2022_jp_ext", JAPANESE), ("iso2022_kr", KOREAN)):
        content = sentences(text, 3000)
        found, notes = read(tmp_path / "a.txt", content.encode(encoding))
        assert found == [content] and notes == [f"files read as {encoding}: 1 (a.txt)"]
    colours = "\x1b[31mred\x1b[0m costs \x1b[1m$5\x1b[0m\n"
    assert read(tmp_path / "a.txt", colours) == ([colours], [])


@pytest.mark.parametrize("size", [300, 70_000, 1_500_000])
@pytest.mark.parametrize("text", [FRENCH, RUSSIAN, CHINESE])
def test_utf8_survives_damage(tmp_path, text, size):
    content = sentences(text, size).encode()
    middle = len(content) // 2
    for damaged in (
        content[:middle] + b"\xff" + content[middle:],
        content + "…".encode()[:2],
        b"\x80" + content,
    ):
        expected = damaged.decode(errors="replace")
        found, notes = read(tmp_path / "a.txt", damaged)
        assert found == [expected]
        assert notes == [f"unreadable characters (U+FFFD): {expected.count(chr(0xFFFD))} (a.txt)"]


def test_utf8_is_found_for_any_size_of_blocks(tmp_path, monkeypatch):
    content = sentences(RUSSIAN, 3000)
    for block in (7, 100):
        monkeypatch.setattr(dataset, "BLOCK", block)
        assert read(tmp_path / "a.txt", content) == ([content], [])
        assert read(tmp_path / "a.txt", content.encode("koi8_r"))[0] == [content]


def test_short_texts_with_a_few_symbols_are_western(tmp_path):
    for text in (
        "It costs £5 at 20 °C.",
        "© 2001 Smith",
        "10 µm ± 5, half: ½",
        "x • y • z",
        "“It’s fine” – ok",
    ):
        text = "Plain English around it. " * 9 + text
        assert read(tmp_path / "a.txt", text.encode("cp1252"))[0] == [text]


@pytest.mark.parametrize("text", [CHINESE, KOREAN, JAPANESE, RUSSIAN, FRENCH])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_byte_order_mark(tmp_path, text, encoding):
    for content in (sentences(text, 9000), sentences(text, 9000).replace(" ", "").replace("\n", "")):
        found, notes = read(tmp_path / "a.txt", content.encode(encoding))
        assert found == [content] and notes == [f"files read as {encoding}: 1 (a.txt)"]
    rows = [{"text": content}] * 3
    (tmp_path / "a.jsonl").write_bytes("\n".join(map(json.dumps, rows)).encode(encoding))
    assert read(tmp_path / "a.jsonl")[0] == [content] * 3


def test_bytes_that_are_not_utf16_are_not_read_as_such(tmp_path):
    fields = "\n".join("\x01".join(prose(n).split()) for n in range(99))  # as Hive writes tables
    assert read(tmp_path / "a.txt", fields) == ([fields], [])
    overstruck = "N\bNA\bAM\bME\bE " * 99  # as in manual pages
    assert read(tmp_path / "b.txt", overstruck) == ([overstruck], [])
    for content in (random.Random(0).randbytes(9999), bytes(range(256)) * 9, b"one\0two" * 99):
        reader = dataset.TextReader()
        (tmp_path / "c.txt").write_bytes(content)
        assert reader.find_encoding(tmp_path / "c.txt") is None and "zero byte" in reader.left_out[0][1]


def test_byte_order_marks_inside_a_text_are_removed(tmp_path):
    texts = [sentences(CHINESE, 500, seed) for seed in range(3)]
    for encoding in ("utf-8-sig", "utf-16"):
        joined = b"".join(text.encode(encoding) for text in texts)  # as by `cat`
        found, notes = read(tmp_path / "a.txt", joined)
        assert found == ["".join(texts)]
        assert notes == ["byte order marks inside a text, removed: 2 (a.txt)"]
    lines = b"".join((json.dumps({"text": text}) + "\n").encode("utf-8-sig") for text in texts)
    assert read(tmp_path / "a.jsonl", lines) == (texts, [])
    assert read(tmp_path / "a.json", lines) == (texts, [])
    row = json.dumps({"text": "\ufeff" + texts[0]})
    assert read(tmp_path / "a.jsonl", row)[0] == texts[:1]
    assert read(tmp_path / "a.csv", "\ufefftext,id\none,1\n\ufefftwo,2\n".encode())[0] == ["one", "two"]
    plain = dataset.TextReader(plain=True), dataset.Text()
    plain[0].read(tmp_path / "a.csv", plain[1])
    assert plain[1][0:3] == b"\xef\xbb\xbf"


# -----------------------------------------------------------------------------
# Archives


def pack(ending):
    packers = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    return packers[ending] if ending != "zst" else pytest.importorskip("zstandard").compress


@pytest.mark.parametrize("ending", ["gz", "bz2", "xz", "zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
def test_an_archive_that_is_cut_off_or_damaged_is_an_error_that_says_so(tmp_path, name, ending):
    rows = [{"text": f"{n} {prose(n)}"} for n in range(500)]
    content = "\n".join(json.dumps(row) for row in rows).encode()
    if name == "a.json":
        content = json.dumps(rows).encode()
    if name == "a.csv":
        content = b"text\n" + b"".join(b'"%b"\n' % row["text"].encode() for row in rows)
    whole = pack(ending)(content)
    file = tmp_path / f"{name}.{ending}"
    read(file, whole)
    joined = pack(ending)(b"") + whole + whole[: len(whole) // 2]  # the last of three members is cut
    harmed = [whole[: len(whole) * part // 10] for part in (1, 5, 9)] + [joined, b"no archive", whole[:-1]]
    for damaged in harmed:
        message = error_of(file, damaged)
        assert f"{file} is cut off or damaged: " in message and "download it again" in message


def test_large_windows_of_zstd(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    options = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)  # as of `zstd --long=28`
    packer = zstandard.ZstdCompressor(compression_params=options).compressobj()
    content = sentences(FRENCH, 300_000)
    packed = packer.compress(content.encode()) + packer.flush()
    assert zstandard.get_frame_parameters(packed).window_size == 2**28
    assert read(tmp_path / "a.txt.zst", packed)[0] == [content]


def test_zstd_frames(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"extra"
    parts = [zstandard.compress(sentences(FRENCH, size, size).encode()) for size in (10, 200_000, 3)]
    content = "".join(sentences(FRENCH, size, size) for size in (10, 200_000, 3))
    assert read(tmp_path / "a.txt.zst", b"".join(parts))[0] == [content]
    assert read(tmp_path / "a.txt.zst", skippable.join(parts))[0] == [content]
    assert read(tmp_path / "a.txt.zst", b"")[0] == []


# -----------------------------------------------------------------------------
# Separators


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("separator", ["\\n\\n", "\n\n", "\\r\\n\\r\\n", "\\r\\r", "\\n---\\n", "%%"])
def test_a_separator_means_line_ends_of_any_kind(tmp_path, monkeypatch, end, separator):
    texts = [prose(n, 9).replace(". ", "." + end) for n in range(300)]
    between = separator.replace("\\r\\n", "\n").replace("\\r", "\n").replace("\\n", "\n").replace("\n", end)
    for block in (50, 2**20):
        monkeypatch.setattr(dataset, "BLOCK", block)
        found, notes = read(tmp_path / "a.txt", between.join(texts).encode(), separator=separator)
        assert found == texts and "300 (a.txt)" in notes[0]


def test_single_line_ends_are_no_blank_line(tmp_path):
    text = "one\r\ntwo\r\n\r\nthree\nfour\n\r\nfive"
    assert read(tmp_path / "a.txt", text, separator="\\n\\n")[0] == ["one\r\ntwo", "three\nfour", "five"]


def test_a_separator_that_never_occurs_is_reported(tmp_path):
    assert read(tmp_path / "a.txt", prose(1), separator="%%")[1] == [
        "files that '%%' does not split: 1 (a.txt)"
    ]
    assert read(tmp_path / "a.txt", prose(1))[1] == []


# -----------------------------------------------------------------------------
# JSON


def test_the_one_list_of_rows_in_an_object_is_found(tmp_path):
    texts = [prose(n) for n in range(50)]
    rows = [{"id": n, "text": text} for n, text in enumerate(texts)]
    for value in (
        {"data": rows},
        {"version": 2, "tags": ["a"], "data": rows, "end": None},
        {"info": {"fields": [{"name": "text"}]}, "result": {"items": rows}},
        [rows],
    ):
        found, notes = read(tmp_path / "a.json", json.dumps(value, indent=1))
        assert found == texts
        assert notes == ["rows read from a list inside a JSON object: 50 (a.json)"]
    poems = {"poems": [{"verse": text} for text in texts]}
    assert read(tmp_path / "a.json", json.dumps(poems), text_field="verse")[0] == texts
    assert read(tmp_path / "a.json", json.dumps({"text": "one", "data": rows}))[0] == ["one"]


def test_other_json_is_plain_text_and_reported(tmp_path):
    rows = [{"text": prose(n)} for n in range(50)]
    chats = [{"messages": [{"role": "user", "content": prose(n)}]} for n in range(50)]
    unknown = [{"poem": prose(n)} for n in range(50)]
    for value in ({"train": rows, "test": rows}, chats, unknown, {"name": "x", "files": [1, 2]}, [1, 2]):
        content = json.dumps(value)
        found, notes = read(tmp_path / "a.json", content)
        assert found == [content]
        assert notes == ["files without a known text field, read as plain text: 1 (a.json)"]


def test_a_json_value_that_is_too_long_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "BLOCK", 10)
    message = error_of(tmp_path / "a.json", json.dumps({"data": [{"text": prose(n)} for n in range(99)]}))
    assert "value 1 is longer than 2,560 characters" in message and "JSON lines" in message
    broken = "[1, 2, {" * 900  # which is found at once
    assert read(tmp_path / "a.json", broken)[0] == [broken]


def test_json_that_is_nested_too_deeply_is_plain_text(tmp_path):
    for content in ("[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000):
        assert read(tmp_path / "a.json", content)[0] == [content]


# -----------------------------------------------------------------------------
# Rows without a text


def rows_without_a_text(count, missing):
    rows = [{"text": prose(n)} for n in range(count - missing)]
    return "\n".join(map(json.dumps, rows[:1] + [{"text": None}] * missing + rows[1:]))


@pytest.mark.parametrize("count, missing", [(2, 1), (50, 1), (99, 2), (500, 5), (5000, 50)])
def test_some_rows_may_lack_a_text(tmp_path, count, missing):
    found, notes = read(tmp_path / "a.jsonl", rows_without_a_text(count, missing))
    assert len(found) == count - missing and notes == [f"rows without a text: {missing} (a.jsonl)"]


@pytest.mark.parametrize("count, missing", [(4, 3), (50, 3), (500, 6), (5000, 51), (20, 19)])
def test_many_rows_without_a_text_are_accepted_only_if_the_field_is_named(tmp_path, count, missing):
    content = rows_without_a_text(count, missing)
    message = error_of(tmp_path / "a.jsonl", content)
    assert f"a.jsonl has {missing:,} rows without a text, of {count:,}; the first is line 2" in message
    assert "--text-field text" in message
    found, notes = read(tmp_path / "a.jsonl", content, text_field="text")
    assert len(found) == count - missing and notes == [f"rows without a text: {missing} (a.jsonl)"]


def test_a_named_field_may_begin_late_but_must_exist(tmp_path):
    rows = [{"id": n} for n in range(100)] + [{"poem": "late"}]
    content = "\n".join(map(json.dumps, rows))
    assert read(tmp_path / "a.jsonl", content, text_field="poem")[0] == ["late"]
    assert "has no field verse with strings" in error_of(tmp_path / "a.jsonl", content, text_field="verse")
    assert read(tmp_path / "empty.jsonl", "", text_field="poem") == ([], [])


@pytest.mark.parametrize(
    "name, content", [("a.jsonl", ""), ("b.jsonl", "\n \n"), ("a.csv", "id,text\n"), ("b.csv", "")]
)
def test_tables_without_rows_have_no_documents(tmp_path, name, content):
    assert read(tmp_path / name, content) == ([], [])
    assert read(tmp_path / name, content, text_field="text") == ([], [])


# -----------------------------------------------------------------------------
# CSV and TSV


def table(rows, delimiter=",", **how):
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter, **how).writerows(rows)
    return file.getvalue()


MISFITS = "rows with another number of cells than the header"


@pytest.mark.parametrize("delimiter", [",", ";"])
def test_surplus_cells_belong_to_the_text(tmp_path, delimiter):
    rows = [[n, f"text {n}", "x"] for n in range(200)]
    content = (
        table([["id", "text", "label"], *rows], delimiter)
        + f"7{delimiter}hello{delimiter} world{delimiter}x\n"
    )
    found, notes = read(tmp_path / "a.csv", content)
    assert found == [f"text {n}" for n in range(200)] + [f"hello{delimiter} world"]
    assert notes == [f"{MISFITS}: 1 (a.csv)"]


def test_many_rows_with_another_number_of_cells_are_accepted_only_if_the_field_is_named(tmp_path):
    content = "id,text\n" + "1,hello, world\n" * 30 + "2,fits\n" * 70 + "\n3\n"
    message = error_of(tmp_path / "a.csv", content)
    assert "31 rows with another number of cells than the header, of 101; the first is line 2" in message
    assert "--text-field text" in message
    found, notes = read(tmp_path / "a.csv", content, text_field="text")
    assert found == ["hello, world"] * 30 + ["fits"] * 70
    assert notes == [f"{MISFITS}: 31 (a.csv)", "rows without a text: 1 (a.csv)"]
    assert read(tmp_path / "a.csv", "id,text\n" + "1,a, b\n" * 2 + "2,fits\n" * 9)[1] == [
        f"{MISFITS}: 2 (a.csv)"
    ]
    assert "3 rows with another" in error_of(tmp_path / "a.csv", "id,text\n" + "1,a, b\n" * 3 + "2,c\n" * 9)


def test_quotes_in_a_tsv_are_text(tmp_path):
    texts = ['"Hello," he said.', 'a stray " here', '"opened only', "plain", '12" long', '"complete"'] * 9
    content = "id\ttext\n" + "".join(f"{n}\t{text}\n" for n, text in enumerate(texts))
    assert read(tmp_path / "a.tsv", content) == (texts, [])


def test_a_tsv_has_quotes_if_its_rows_fit_only_with_them(tmp_path):
    texts = ["one\nwith two lines", "one\twith a tab", 'with "quotes"\n', "plain"] * 9
    content = table([["id", "text"], *enumerate(texts)], "\t")
    assert read(tmp_path / "a.tsv", content) == (texts, ["tables read with quotes around cells: 1 (a.tsv)"])


def test_a_stray_quote_in_a_csv_takes_no_rows(tmp_path):
    texts = [f"text {n}" for n in range(300)]
    texts[100] = '"opened only'
    content = "id,text\n" + "".join(f"{n},{text}\n" for n, text in enumerate(texts))
    assert read(tmp_path / "a.csv", content) == (
        texts,
        ["tables read without quotes around cells: 1 (a.csv)"],
    )
    content = table([["id", "text"], *[(n, f"a, {n}") for n in range(2000)]]) + '1,"open\n2,x\n3,"closed"\n'
    found, notes = read(tmp_path / "a.csv", content)
    assert found == [f"a, {n}" for n in range(2000)] and f"{MISFITS}: 1 (a.csv)" in notes


def test_cells_of_many_lines_and_one_column(tmp_path):
    texts = [f'line, one\nline "two" {n}\r\n' for n in range(50)]
    assert read(tmp_path / "a.csv", table([["id", " text"], *enumerate(texts)])) == (texts, [])
    assert read(tmp_path / "a.csv", table([["text"], *[[text] for text in texts]])) == (texts, [])
    assert read(tmp_path / "a.csv", "text\nHello, world\nand more, too\n")[0] == [
        "Hello, world",
        "and more, too",
    ]


def test_broken_rows_at_the_beginning_do_not_hide_the_table(tmp_path):
    rows = "".join(f'{n},"a" b\n' for n in range(20)) + "".join(f'{n},"text, {n}"\n' for n in range(3000))
    found, notes = read(tmp_path / "a.csv", "id,text\n" + rows)
    assert found == [f"text, {n}" for n in range(3000)]
    assert notes == [f"{MISFITS}: 20 (a.csv)", "rows without a text: 20 (a.csv)"]
    for header in ('id,"te"xt\n', '"id,text\n'):
        found, notes = read(tmp_path / "a.csv", header + rows)
        assert found == [header + rows] and "read as plain text: 1 (a.csv)" in notes[-1]


def test_a_new_format_is_one_entry_of_the_table(tmp_path, monkeypatch):
    def read_poems(file, stream, reader):
        return "verse", ((f"line {number}", line.strip() or None) for number, line in enumerate(stream, 1))

    monkeypatch.setitem(dataset.READERS, ".poems", read_poems)
    found, notes = read(tmp_path / "a.poems", "one\n\ntwo\n")
    assert found == ["one", "two"]
    assert notes == ["rows without a text: 1 (a.poems)", "texts read from the field verse: 2 (a.poems)"]
    (tmp_path / "val.poems.gz").write_bytes(gzip.compress(b"three"))
    found = dataset.find_files(str(tmp_path))
    assert [file.name for file in found.train + found.val] == ["a.poems", "val.poems.gz"] and found.val
    chosen = dataset.choose_files(
        "hf:some/set", "", {"a.poems": 2, "b.poems": 2, "test.poems": 1, "x.pdf": 9}
    )
    assert list(chosen["train"]) == ["a.poems", "b.poems"] and chosen["val"] == "test.poems"


# -----------------------------------------------------------------------------
# Parquet


def parquet_file(path, column):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": column}), path)
    return path


def test_binary_columns_of_parquet_are_texts(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    texts = [prose(n) for n in range(100)]
    dictionary = arrow.array(texts).cast(arrow.binary()).dictionary_encode()
    content = [text.encode() for text in texts]
    for column in (
        arrow.array(content, arrow.binary()),
        arrow.array(content, arrow.large_binary()),
        dictionary,
    ):
        file = parquet_file(tmp_path / "a.parquet", column)
        assert read(file) == (texts, []) and read(file, text_field="text") == (texts, [])


def test_bytes_in_parquet_that_are_no_utf8_are_rows_without_a_text(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    content = [prose(n).encode() for n in range(100)]
    content[3] = b"\xff\xd8\xff an image"
    file = parquet_file(tmp_path / "a.parquet", arrow.array(content, arrow.binary()))
    assert read(file)[1] == ["rows without a text: 1 (a.parquet)"]
    file = parquet_file(tmp_path / "b.parquet", arrow.array([b"\xff\xd8"] * 100, arrow.binary()))
    assert "has no field text with strings" in error_of(file)


def test_an_old_pyarrow_is_an_error(tmp_path, monkeypatch):
    arrow = pytest.importorskip("pyarrow")
    file = parquet_file(tmp_path / "a.parquet", ["one", "two"])
    for version in ("13.0.0", "14.0.0", "2.0"):
        monkeypatch.setattr(arrow, "__version__", version)
        assert "CVE-2023-47248" in error_of(file) and "pip install --upgrade" in error_of(file)
    for version in ("14.0.1", "15.0.0.dev1", "100.0"):
        monkeypatch.setattr(arrow, "__version__", version)
        assert read(file)[0] == ["one", "two"]
