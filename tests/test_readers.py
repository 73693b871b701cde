"Readers: tiny data sets in the true formats, written here; what is broken is told in one sentence, and nothing runs."
import io, json, os, pickle, struct, sys, zlib
from pathlib import Path
import cv2
import numpy as np
import pyarrow as pa, pyarrow.parquet as pq
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools import mask as coco
from dr2seg_lib import readers
from dr2seg_lib.dialogue import parse
from dr2seg_lib.masks import encode
from dr2seg_lib.recipes import RECIPES
from dr2seg_lib.rewards import seg_zero
from dr2seg_lib.rollout import Group, Response
from dr2seg_lib.readers import BrokenRecord, Own, Parquet, ReasonSeg, RefCOCO, check, open_data, paint, parsed, picture, plain_pickle, rle_mask, solved

W, H = 40, 30
PHOTO = np.random.default_rng(0).integers(0, 255, (H, W, 3), dtype=np.uint8)
y, x = np.mgrid[:H, :W]
DISC = np.hypot(x - 15, y - 14) < 9
BOX = [[5, 6], [20, 6], [20, 16], [5, 16]]     # 16 × 11 pixels with its outline
masks = arrays(bool, st.tuples(st.integers(1, 20), st.integers(1, 20)))


def sentence(f, *args, **kwargs):
    "What a call complains of: one line, one sentence."
    with pytest.raises((ValueError, FileNotFoundError)) as e: f(*args, **kwargs)
    text = str(e.value)
    assert '\n' not in text and text.endswith('.') and ';' in text, text
    return text


def encoded(image=PHOTO, format='PNG'):
    out = io.BytesIO()
    Image.fromarray(image).save(out, format)
    return out.getvalue()


def shape(points, label='target'): return dict(label=label, points=points)


@pytest.fixture
def reasonseg(tmp_path):
    "A function that writes one ReasonSeg pair."
    def write(name, shapes=(), text=('what is it',), split='val', image=encoded(format='JPEG'), encoding='utf-8', root=tmp_path/'ReasonSeg', **more):
        (root/split).mkdir(parents=True, exist_ok=True)
        if image: (root/split/f'{name}.jpg').write_bytes(image)
        record = dict(text=list(text) if isinstance(text, tuple) else text, is_sentence=False, shapes=list(shapes) if isinstance(shapes, tuple) else shapes) | more
        (root/split/f'{name}.json').write_text(json.dumps(record, ensure_ascii=False), encoding=encoding)
        return root
    return write


def test_protocols(reasonseg, tmp_path):
    root = reasonseg('a', [shape(BOX), shape([[10, 8], [32, 8], [32, 10], [10, 10]], 'ignore')])
    reasonseg('b', [shape(BOX, 'ignore')]), reasonseg('c', [])
    for plain, merged in zip(open_data(root, 'val'), open_data(root, 'val', protocol='visionreasoner')):
        covered = plain.mask if plain.ignore is None else plain.mask | plain.ignore
        assert np.array_equal(merged.mask, covered) and merged.ignore is None and len(merged.targets) == covered.any() and merged.query == plain.query
    assert open_data(root, 'val').protocol == 'lisa' and open_data(root, 'val')[0].ignore.any()
    hub = parquet(tmp_path/'ReasonSeg_val'/'test-00000-of-00001.parquet', [hub_row()]).parent
    assert open_data(hub, 'val').protocol == 'visionreasoner'
    assert 'has lost which pixels to ignore' in sentence(open_data, hub, 'val', protocol='lisa')
    assert 'use lisa or visionreasoner' in sentence(open_data, hub, 'val', protocol='lissa')


def test_drawing_again_needs_no_file(reasonseg):
    for name, n in dict(a=5, b=1, c=4).items(): root = reasonseg(name, text=tuple(f'{name}{k}' for k in range(n)), split='train')
    data = ReasonSeg(root, 'train')
    assert len(data) == 10 and [ReasonSeg(root, 'train', texts=s).index for s in range(9)] == [data.drawn(s).index for s in range(9)]
    for file in (root/'train').glob('*.json'): file.unlink()
    assert len({tuple(data.drawn([7, epoch]).index) for epoch in range(9)}) > 4 and len(data) == 10


@pytest.fixture
def own(tmp_path):
    "A function that writes a folder of one's own."
    def write(*records, **files):
        (tmp_path/'images').mkdir(exist_ok=True)
        (tmp_path/'images'/'a.png').write_bytes(encoded())
        for name, data in files.items(): (tmp_path/f'{name}.png').write_bytes(data)
        rows = [r if isinstance(r, str) else json.dumps(dict(id=f'r{i}', image='images/a.png', query='what') | r) for i, r in enumerate(records)]
        (tmp_path/'data.jsonl').write_text('\n'.join(rows))
        return tmp_path
    return write


@pytest.fixture
def refcoco(tmp_path):
    "A function that writes refs, instances and an image."
    def write(refs, segmentation=([[10., 10., 30., 10., 30., 20., 10., 20.]],), name='refs(unc).p', protocol=0, file_name='COCO_train2014_000000000007.jpg'):
        home = tmp_path/'refcoco'
        (home/'images').mkdir(parents=True, exist_ok=True)
        (home/'images'/'COCO_train2014_000000000007.jpg').write_bytes(encoded(format='JPEG'))
        instances = dict(categories=[], images=[dict(id=7, file_name=file_name, width=W, height=H)],
                         annotations=[dict(id=70 + i, image_id=7, segmentation=s) for i, s in enumerate(segmentation)])
        (home/'instances.json').write_text(json.dumps(instances))
        (home/name).write_bytes(refs if isinstance(refs, bytes) else pickle.dumps(refs, protocol=protocol))
        return home
    return write


def ref(id=1, ann=70, split='testA', sents=('the cup', 'left thing')):
    "A reference as the release has it."
    return dict(ref_id=id, ann_id=ann, image_id=7, split=split, category_id=1, file_name='COCO_train2014_000000000007_0.jpg', sent_ids=[1, 2],
                sentences=[dict(sent=s, raw=s, tokens=s.split(), sent_id=i) for i, s in enumerate(sents)])


def parquet(path, rows, **kwargs):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **kwargs)
    return path


def hub_row(k=0, mask=DISC, **more):
    return dict(image=dict(bytes=encoded(), path=None), text=f'thing {k}', mask=mask.tolist() if isinstance(mask, np.ndarray) else mask, image_id='7', ann_id=str(k), img_height=H, img_width=W) | more


def training_row(solution, image=PHOTO, **more):
    return dict(id='a', problem='the cup', solution=solution, image=dict(bytes=encoded(image), path=None), img_height=H, img_width=W) | more


# masks in their three forms

@given(masks)
def test_rle_round_trip(mask):
    assert np.array_equal(rle_mask(json.loads(json.dumps(encode(mask))), mask.shape[::-1], 'f', 'mask'), mask)


@given(masks)
def test_uncompressed_rle_is_as_coco_reads_it(mask):
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[0], mask.T.ravel(), [2]]), prepend=2)), prepend=0).tolist()
    rle = dict(size=list(mask.shape), counts=runs)
    if sum(runs) == mask.size: assert np.array_equal(rle_mask(rle, mask.shape[::-1], 'f', 'mask'), coco.decode(coco.frPyObjects(rle, *mask.shape)))


@given(st.one_of(st.text(max_size=30), st.binary(max_size=20).map(lambda b: b.decode('latin1')),
                 st.lists(st.one_of(st.integers(-5, 50), st.floats(), st.none(), st.booleans()), max_size=5), st.none(), st.integers()))
def test_any_counts_give_a_mask_or_a_sentence(counts):
    try: assert rle_mask(dict(size=[4, 5], counts=counts), (5, 4), 'f', 'mask').shape == (4, 5)
    except BrokenRecord as e: assert 'counts' in str(e)


@given(masks)
def test_outlines_give_the_mask_back(mask):
    "Filled holes aside, contours painted with their outlines are the mask."
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    full = cv2.drawContours(np.zeros(mask.shape, np.uint8), contours, -1, 1, cv2.FILLED)
    assert np.array_equal(paint([c[:, 0] for c in contours], [1]*len(contours), mask.shape[::-1]), full)


@given(masks.filter(np.any))
def test_png_round_trip(tmp_path_factory, mask):
    home = tmp_path_factory.mktemp('png')
    Image.fromarray(np.zeros((*mask.shape, 3), np.uint8)).save(home/'a.png')
    Image.fromarray(mask).save(home/'m.png')
    (home/'data.jsonl').write_text(json.dumps(dict(id='a', image='a.png', query='q', mask='m.png')))
    assert np.array_equal(Own(home, 'all')[0].mask, mask)


def test_painting_by_hand():
    "The small one shows on the large one, whatever comes first; fractions are dropped; the outline belongs to it."
    big, small = np.array([[0, 0], [9, 0], [9, 9], [0, 9]], np.int32), np.array([[2, 2], [4, 2], [4, 4], [2, 4]], np.int32)
    for polygons, values in ([big, small], [1, 255]), ([small, big], [255, 1]):
        drawn = paint(polygons, values, (12, 12))
        assert ((drawn == 255).sum(), (drawn == 1).sum()) == (9, 91)
    assert readers.polygon([[1.9, 2.9], [-1.9, 3], [5, 5]], 'f', 'p').tolist() == [[1, 2], [-1, 3], [5, 5]]
    assert not paint([], [], (3, 2)).any()


# pictures

def test_pictures_stand_upright():
    out, turned = io.BytesIO(), Image.Exif()
    turned[0x0112] = 6     # to be turned by 90° clockwise
    Image.fromarray(PHOTO).save(out, 'PNG', exif=turned)
    assert np.array_equal(readers.pixels(out.getvalue(), 'f'), np.rot90(PHOTO, -1))


@pytest.mark.parametrize('mode', ['L', 'RGBA', 'P', '1'])
def test_every_mode_becomes_rgb(mode):
    out = io.BytesIO()
    Image.fromarray(PHOTO).convert(mode).save(out, 'PNG')
    assert readers.pixels(out.getvalue(), 'f').shape == (H, W, 3)


@pytest.mark.parametrize('side', [9_000, 13_000, 100_000])
@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_a_huge_declared_size_is_not_decoded(side):
    chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    bomb = b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0)) + chunk(b'IDAT', b'') + chunk(b'IEND', b'')
    assert 'pixels' in sentence(picture, bomb, 'f')


@given(st.sampled_from([encoded(), encoded(format='JPEG')]), st.data())
def test_damaged_pictures_are_decoded_or_told(whole, data):
    damaged = bytearray(whole[:data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 4))):
        if damaged: damaged[data.draw(st.integers(0, min(len(damaged) - 1, 300)))] = data.draw(st.integers(0, 255))
    try: picture(bytes(damaged), 'f').convert('RGB')
    except BrokenRecord: pass


def test_only_plain_picture_formats_are_opened():
    out = io.BytesIO()
    Image.fromarray(PHOTO).save(out, 'EPS')     # its decoder is a program
    assert 'cannot be decoded' in sentence(picture, out.getvalue(), 'f')


# ReasonSeg

def test_reasonseg_by_hand(reasonseg):
    root = reasonseg('a', [shape(BOX), shape([[10, 8], [12, 8], [12, 10], [10, 10]], 'ignore_region'), shape([], 'flag')], is_sentence=True)
    s, = ReasonSeg(root, 'val')
    assert (s.id, s.query, s.size, s.tags, len(s.targets)) == ('a', 'what is it', (W, H), {'query': 'long'}, 1)
    assert s.ignore.sum() == 9 and s.mask.sum() == 16*11 - 9 and not (s.mask & s.ignore).any() and s.targets[0].box == (5, 6, 20, 16)


def test_several_polygons_are_one_target(reasonseg):
    s, = ReasonSeg(reasonseg('a', [shape(BOX), shape([[30, 20], [35, 20], [35, 25]])]), 'val')
    assert len(s.targets) == 1 and s.targets[0].box == (5, 6, 35, 25)


def test_files_without_polygons_are_samples(reasonseg):
    for name, shapes in dict(a=[], b=[shape(BOX, 'flag')], c=[shape(BOX, 'ignore')]).items(): root = reasonseg(name, shapes)
    a, b, c = ReasonSeg(root, 'val')
    assert a.targets == b.targets == c.targets == () and a.ignore is None and c.ignore.sum() == 16*11


def test_cp1252_where_utf8_fails(reasonseg):
    reasonseg('a', text=['a café'])
    assert [s.query for s in ReasonSeg(reasonseg('b', text=['the waiter’s café'], encoding='cp1252'), 'val')] == ['a café', 'the waiter’s café']


def test_texts(reasonseg):
    for split in 'val', 'train':
        for name in 'ab': root = reasonseg(name, text=[f'{name}{k}' for k in range(3)], split=split)
    asked = lambda split, **o: [s.query for s in open_data(root, split, **o)]
    assert asked('val') == asked('train', texts='first') == ['a0', 'b0']
    assert asked('train') == asked('val', texts='all') == ['a0', 'a1', 'a2', 'b0', 'b1', 'b2']
    drawn = [asked('train', texts=seed) for seed in range(20)]
    assert all([t[0] for t in d] == ['a', 'b'] for d in drawn) and len(set(map(tuple, drawn))) > 5 and drawn[3] == asked('train', texts=3)
    assert len({s.id for s in ReasonSeg(root, 'train')}) == 6
    assert 'texts' in sentence(ReasonSeg, root, 'train', texts='some')


def test_both_layouts(reasonseg, tmp_path):
    root = reasonseg('a', root=tmp_path/'reason_seg'/'ReasonSeg')
    (root/'explanatory').mkdir()
    (root/'explanatory'/'train.json').write_text('[]')
    for path in tmp_path, root.parent, root, root/'val': assert [s.id for s in open_data(path, 'val')] == ['a']
    assert 'use one of val' in sentence(open_data, root, 'test')
    assert 'use one of val' in sentence(open_data, root/'val', 'train')


@pytest.mark.parametrize('change, words', [
    (dict(shapes=[shape([[1, 1], [5, 5]])]), ['shapes[0].points', '2 points']),
    (dict(shapes=[shape([[1, 1], [5, float('nan')], [3, 3]])]), ['shapes[0].points', 'finite']),
    (dict(shapes=[shape([[1, 1], [5, 1e12], [3, 3]])]), ['shapes[0].points']),
    (dict(shapes=[shape('1,1')]), ['shapes[0].points']),
    (dict(shapes=[shape([[1, '1'], [5, 5], [3, 3]])]), ['shapes[0].points']),
    (dict(shapes=[shape([[1, True], [5, 5], [3, 3]])]), ['shapes[0].points']),
    (dict(shapes=[dict(points=BOX)]), ['label', 'missing']),
    (dict(shapes=['target']), ['label', 'object']),
    (dict(shapes=None), ['shapes', 'list']),
    (dict(text='what'), ['text', 'list']),
    (dict(text=[]), ['text[0]', 'missing']),
    (dict(text=[5]), ['text[0]', 'a text']),
    (dict(text=[' ']), ['text[0]', 'blank']),
    (dict(is_sentence='no'), ['is_sentence']),
    (dict(image=encoded(format='JPEG')[:500]), ['decoded']),
    (dict(image=b'GIF89a'), ['decoded']),
    (dict(image=None), ['a.jpg', 'does not exist']),
])
def test_broken_reasonseg_is_told(reasonseg, change, words):
    reasonseg('whole', [shape(BOX)])
    root = reasonseg('a', **change)
    data = ReasonSeg(root, 'val')
    assert len(data) == 2 and data[1].id == 'whole'
    told = sentence(data.__getitem__, 0)
    assert 'a.json' in told and all(w in told for w in words)
    report = check(root)
    assert report.broken == (told,) and report.splits['val']['samples'] == 1


@pytest.mark.parametrize('text', ['{', '[' * 100_000, '[]', '5', '', '"\x81"'])
def test_broken_json_is_told(reasonseg, text):
    root = reasonseg('a')
    (root/'val'/'a.json').write_bytes(text.encode('latin1'))
    assert 'a.json' in sentence(ReasonSeg(root, 'val').__getitem__, 0) and len(check(root).broken) == 1


def test_an_image_without_annotation_is_told(reasonseg):
    root = reasonseg('a')
    (root/'val'/'b.jpg').write_bytes(encoded(format='JPEG'))
    assert 'b.json' in sentence(ReasonSeg(root, 'val').__getitem__, 1)


# parquet

def test_evaluation_set_across_shards_and_groups(tmp_path):
    data = tmp_path/'ReasonSeg_val'/'data'
    rows = [hub_row(k, np.roll(DISC, k, 1) & (k != 2)) for k in range(5)]
    parquet(data/'test-00000-of-00002.parquet', rows[:3], row_group_size=2)
    parquet(data/'test-00001-of-00002.parquet', rows[3:], row_group_size=1)
    for split in 'val', 'test', 'testA':
        hub = open_data(tmp_path/'ReasonSeg_val', split)
        assert [s.query for s in hub] == [f'thing {k}' for k in range(5)] and hub[2].targets == () and len({s.id for s in hub}) == 5
        for k in 4, 0, 3, 1: assert np.array_equal(hub[k].mask, np.roll(DISC, k, 1)) and np.array_equal(hub[k].image, PHOTO)
    assert len(open_data(tmp_path/'ReasonSeg_val', 'val', limit=3)) == 3
    assert 'use one of test' in sentence(open_data, tmp_path/'ReasonSeg_val', 'train')
    counts = check(tmp_path/'ReasonSeg_val').splits['test']
    assert (counts['samples'], counts['images'], counts['targets'], counts['without targets']) == (5, 1, 4, 1)


def test_one_group_is_held(tmp_path):
    file = parquet(tmp_path/'test-00000-of-00001.parquet', [hub_row(k) for k in range(6)], row_group_size=2)
    hub, read = Parquet(file, 'test'), []
    for s in hub: read.append(hub.held[1].num_rows)
    assert read == [2]*6


def test_training_set(tmp_path):
    frame = cv2.resize(PHOTO, (840, 840))
    solution = '[{"bbox_2d": [84, 100, 420, 800], "point_2d": [200, 300]}, {"bbox_2d": [0, 0, 840, 840], "point_2d": [420, 420]}]'
    parquet(tmp_path/'data'/'train-00000-of-00001.parquet', [training_row(solution, frame, difficulty=4.5)])
    s, = open_data(tmp_path, 'train')
    assert (s.id, s.query, s.size, s.tags) == ('a', 'the cup', (840, 840), {'difficulty': 4.5})
    assert [(t.box, t.point) for t in s.scaled(840)] == [((84, 100, 420, 800), (200, 300)), ((0, 0, 840, 840), (420, 420))]
    assert 'use one of train' in sentence(open_data, tmp_path, 'val')


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(0, 840), st.integers(0, 840))
def test_solutions_survive_an_image_of_any_size(w, h, a, b):
    box = [min(a, b), 0, max(a, b), b]
    t, = solved(json.dumps([dict(bbox_2d=box, point_2d=[a, b])]), (w, h), 'f')
    back = [int(v*840/n + 0.5) for v, n in zip((*t.box, *t.point), (w, h)*3)]
    assert back == [*box, a, b]


def test_seg_zero_solutions_keep_both_points():
    t, = solved('<box>(84,100),(420,800)</box><points>(200,300),(210,600)</points>', (840, 840), 'f')
    assert (t.box, t.point, t.second) == ((84, 100, 420, 800), (200, 300), (210, 600))
    visionreasoner, = solved('[{"bbox_2d": [84, 100, 420, 800], "point_2d": [200, 300]}]', (840, 840), 'f')
    assert visionreasoner.second is None


# a row as Seg-Zero's own script writes it: two lines, no spaces, the frame's whole pixels
SEG_ZERO = '<box>(84,210),(420,630)</box>\n<points>(210,315),(378,525)</points>'


@pytest.fixture
def seg_zero_set(tmp_path):
    "Seg-Zero's training set by hand: its columns, in its order, and no others."
    columns = dict(id=['refcocog_7'], problem=['the cup'], solution=[SEG_ZERO],
                   image=[dict(bytes=encoded(cv2.resize(PHOTO, (840, 840))), path=None)],
                   img_height=[H], img_width=[W])
    file = tmp_path/'refCOCOg_2k_840'/'data'/'train-00000-of-00001.parquet'
    file.parent.mkdir(parents=True)
    pq.write_table(pa.table(columns), file)
    return open_data(file.parent.parent, 'train')


def test_seg_zero_set_by_hand(seg_zero_set):
    s, = seg_zero_set
    t, = s.scaled(840)
    assert (s.id, s.query, s.size) == ('refcocog_7', 'the cup', (840, 840))
    assert (t.box, t.point, t.second) == ((84, 210, 420, 630), (210, 315), (378, 525))
    half, = s.scaled(420)
    assert (half.point, half.second) == ((105, 158), (189, 263))


ANSWER = '<think>A cup.</think><answer>{"bbox": [84, 210, 420, 630], "points_1": [378, 525], "points_2": [210, 315]}</answer>'


@pytest.mark.parametrize('method', ['seg_zero', 'pixelthink', 'dpad'])
def test_seg_zero_sets_are_rewarded(seg_zero_set, method):
    "The points of the answer lie in its box: what compares them with the two true ones must have two."
    text = ANSWER + '<caption>a cup</caption>' if method == 'dpad' else ANSWER
    answers = [Response(t, parse(t), [1, 2], [.1, .1], [.9, .9], 2) for t in (text, text.replace('[378, 525]', '[90, 620]'))]
    terms, total = RECIPES[method].reward(Group(seg_zero_set[0], answers, [None, None]), 840)
    assert all(terms[k].tolist() == [1, 1] for k in ('thinking_format', 'answer_format', 'iou', 'box'))
    assert terms['points'].tolist() == [1, 0] and total[0] > total[1]


def test_targets_without_a_second_point_are_rewarded():
    "VisionReasoner's solutions have boxes and one point; Seg-Zero's terms take it for both."
    one = solved('[{"bbox_2d": [84, 210, 420, 630], "point_2d": [210, 315]}]', (840, 840), 'f')
    both = ANSWER.replace('[378, 525]', '[220, 320]')
    assert set(seg_zero(both, list(one)).values()) == {1} and seg_zero(ANSWER, list(one))['points'] == 0
    two = solved('[{"bbox_2d": [84, 210, 200, 630], "point_2d": [210, 315]}, {"bbox_2d": [300, 300, 420, 500], "point_2d": [378, 525]}]', (840, 840), 'f')
    assert set(seg_zero(ANSWER, list(two)).values()) == {1}


@pytest.mark.parametrize('solution', ['', 'nothing', '{}', '5', '[5]', '[{"bbox_2d": [1, 2, 3, 4]}]', '[{"bbox_2d": [1, 2, 3], "point_2d": [1, 2]}]',
    '[{"bbox_2d": [1, 2, 900, 4], "point_2d": [1, 2]}]', '[{"bbox_2d": [5, 2, 3, 4], "point_2d": [1, 2]}]', '[{"bbox_2d": [1, 2, NaN, 4], "point_2d": [1, 2]}]',
    f'<box>({"1"*5000},2),(3,4)</box><points>(1,2),(3,4)</points>', '<box>(1,2),(3,4)</box><points>(1,2)</points>',
    '[{"bbox_2d": [1, 2, 3, 4], "point_2d": ["1", 2]}]', '[{"bbox_2d": [-1, 2, 3, 4], "point_2d": [1, 2]}]', '<box>(84,100),(920,800)</box><points>(200,300),(210,600)</points>'])
def test_broken_solutions_are_told(tmp_path, solution):
    file = parquet(tmp_path/'train-00000-of-00001.parquet', [training_row(solution), training_row('[]', id='b')])
    data = Parquet(file, 'train')
    told = sentence(data.__getitem__, 0)
    assert 'row 0' in told and 'solution' in told and data[1].targets == () and check(file).broken == (told,)


@pytest.mark.parametrize('change, words', [
    (dict(mask=DISC[:, :-1].tolist()), 'mask'), (dict(mask=DISC.tolist()[:-1]), 'mask'), (dict(mask=None), 'mask'),
    (dict(mask=[[None]*W]*H), 'mask'), (dict(mask=[[True]*(W + k % 2) for k in range(H)]), 'mask'), (dict(mask=[]), 'mask'),
    (dict(text=None), 'text'), (dict(text=' '), 'text'), (dict(image=dict(bytes=None, path='/etc/passwd')), 'image'), (dict(image=None), 'image'),
    (dict(image=dict(bytes=encoded()[:300], path=None)), 'image')])
def test_broken_rows_are_told(tmp_path, change, words):
    file = parquet(tmp_path/'test-00000-of-00001.parquet', [hub_row(), hub_row(1, **change)])
    data = Parquet(file, 'test')
    told = sentence(data.__getitem__, 1)
    assert 'row 1' in told and words in told and data[0].mask.any() and check(file).broken == (told,)


def test_broken_parquet_files_are_told(tmp_path):
    file = parquet(tmp_path/'test-00000-of-00001.parquet', [hub_row()])
    whole = file.read_bytes()
    for data in whole[:-20], b'', b'PAR1' + b'x'*100 + b'PAR1':
        file.write_bytes(data)
        assert file.name in sentence(open_data, tmp_path, 'test') and len(check(tmp_path).broken) == 1
    file.write_bytes(whole[:4] + b'\xff'*2000 + whole[2004:])
    assert len(check(tmp_path).broken) == 1


@pytest.mark.parametrize('rows, words', [([dict(a=1)], 'columns'), ([hub_row(mask=DISC) | dict(mask='x')], 'mask'), ([hub_row() | dict(mask=[1.5])], 'mask')])
def test_other_columns_are_told(tmp_path, rows, words):
    assert words in sentence(open_data, parquet(tmp_path/'a.parquet', rows), 'val')


def test_without_pyarrow_it_says_what_to_install(tmp_path, monkeypatch):
    file = parquet(tmp_path/'a.parquet', [hub_row()])
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    assert 'pip install pyarrow' in sentence(open_data, file, 'val')


# RefCOCO

@pytest.mark.parametrize('protocol', range(6))
def test_refcoco_by_hand(refcoco, protocol):
    home = refcoco([ref(), ref(2, split='testB', sents=['x']), ref(3, split='train', sents=['y', 'z', 'w'])], protocol=protocol)
    assert [len(open_data(home, s)) for s in ('testA', 'testB', 'train', 'test')] == [1, 1, 1, 2]
    assert [len(open_data(home, s, level='expression')) for s in ('testA', 'testB', 'train', 'test')] == [2, 1, 3, 3]
    s = open_data(home, 'testA')[0]
    assert (s.id, s.query, s.targets[0].box, s.size) == ('1', 'the cup', (10, 10, 29, 19), (W, H)) and s.mask.sum() == 200
    assert [(s.id, s.query) for s in open_data(home, 'testA', level='expression')] == [('1#0', 'the cup'), ('1#1', 'left thing')]
    assert 'use one of testA, testB, train' in sentence(open_data, home, 'val')
    assert check(home).splits['train']['samples'] == 1


def test_python_2_pickles_are_read(refcoco):
    "As cPickle of Python 2 wrote them: byte strings, old names of builtins."
    data = b"(lp1\n(dp2\nS'ref_id'\np3\nI1\nsS'ann_id'\np4\nI70\nsS'split'\np5\nS'val'\np6\nsS'ids'\nc__builtin__\nset\n((lI5\natRsS'sentences'\np7\n(lp8\n(dp9\nS'sent'\np10\nVcaf\\u00e9\np11\nsasa."
    assert open_data(refcoco(data), 'val')[0].query == 'café'


def test_unc_and_umd_come_first(refcoco):
    refcoco([ref(split='val', sents=['google'])], name='refs(google).p')
    assert open_data(refcoco([ref(split='val', sents=['umd'])], name='refs(umd).p'), 'val')[0].query == 'umd'


def test_parts_and_run_lengths_of_an_instance(refcoco):
    parts = [[0., 0., 4., 0., 4., 4., 0., 4.], [10., 10., 12., 10., 12., 12., 10., 12.]]
    home = refcoco([ref(k, 70 + k, sents=[str(k)]) for k in range(3)], segmentation=[parts, encode(DISC), []])
    a, b, c = open_data(home, 'testA')
    assert a.mask.sum() == 20 and len(a.targets) == 1 and np.array_equal(b.mask, DISC) and c.targets == ()


def test_the_joined_file_is_made_once_and_anew_when_the_pickle_changes(refcoco, monkeypatch):
    home = refcoco([ref()])
    open_data(home, 'testA')
    assert sorted(p.name for p in home.iterdir()) == ['images', 'instances.json', 'refs(unc).jsonl', 'refs(unc).p']
    with monkeypatch.context() as m:
        m.setattr(readers, 'plain_pickle', lambda file: pytest.fail('read again'))
        open_data(home, 'testA')
    refcoco([ref(sents=['other words'])])
    os.utime(home/'refs(unc).p', ns=(1, 1))
    assert open_data(home, 'testA')[0].query == 'other words'


def test_a_folder_that_cannot_be_written(refcoco, tmp_path, monkeypatch):
    monkeypatch.setattr(readers.os, 'access', lambda path, how: False)
    monkeypatch.setenv('HOME', str(tmp_path/'home'))
    assert len(open_data(refcoco([ref()]), 'testA')) == 1 and len(list((tmp_path/'home'/'.cache'/'dr2seg').iterdir())) == 1


class Runs:
    "A pickle that runs a command."
    def __init__(self, command): self.command = command
    def __reduce__(self): return os.system, (self.command,)


@pytest.mark.parametrize('protocol', range(6))
def test_a_pickle_that_runs_code_is_refused(refcoco, tmp_path, protocol):
    home = refcoco([ref() | dict(ref_id=Runs(f'touch {tmp_path}/ran'))], protocol=protocol)
    told = sentence(open_data, home, 'testA')
    assert 'refs(unc).p' in told and 'system' in told and check(home).broken == (told,) and not (tmp_path/'ran').exists()
    assert not list(home.glob('*.jsonl*'))


@pytest.mark.parametrize('value', [np.float64(1.), np.zeros(2), Path('x'), pytest.raises, ValueError('x'), io.BytesIO(b'x'), complex(1, 2)])
def test_only_plain_data_is_built(tmp_path, value):
    for protocol in 2, 4:
        (tmp_path/'x.p').write_bytes(pickle.dumps([value], protocol=protocol))
        assert 'asks for' in sentence(plain_pickle, tmp_path/'x.p')


whole = st.integers(-2**54, 2**54)
plain = st.recursive(st.none() | st.booleans() | whole | st.floats(allow_nan=False) | st.text() | st.sets(whole),
                     lambda s: st.lists(s) | st.dictionaries(st.text(), s) | st.tuples(s, s), max_leaves=10)


@given(plain, st.integers(0, 5))
def test_plain_data_comes_back(tmp_path_factory, value, protocol):
    file = tmp_path_factory.getbasetemp()/'plain.p'
    file.write_bytes(pickle.dumps(value, protocol=protocol))
    assert plain_pickle(file) == value


@given(st.binary(max_size=60), st.integers(0, 5), st.data())
def test_any_bytes_are_plain_data_or_refused(tmp_path_factory, data, protocol, draw):
    whole = bytearray(pickle.dumps([ref()], protocol=protocol))
    at = draw.draw(st.integers(0, len(whole)))
    file = tmp_path_factory.getbasetemp()/'any.p'
    for content in data, bytes(whole[:at] + data + whole[at:]), bytes(whole[:at]):
        file.write_bytes(content)
        try: plain_pickle(file)
        except BrokenRecord: pass


@pytest.mark.parametrize('refs, words', [
    ([ref(), ref(2, ann=99)], 'ann_id'), ([ref(), ref() | dict(ref_id='x')], 'ref_id'), ([ref(), ref(2) | dict(split=5)], 'split'), ([ref(), 5], 'ann_id'),
    ([ref(), ref(2) | dict(sentences='x')], 'sentences'), ([ref(), ref(2, sents=[])], 'sentences[0]'), ([ref(), ref(2, sents=[''])], 'sentences[0]'),
    ([ref(), ref(2) | dict(sentences=[5])], 'sentences[0]'), ([ref(), {k: v for k, v in ref(2).items() if k != 'ann_id'}], 'ann_id')])
def test_broken_references_are_told(refcoco, refs, words):
    home = refcoco(refs)
    data = open_data(home, 'testA')
    told = sentence(data.__getitem__, 1)
    assert len(data) == 2 and words in told and 'refs(unc)' in told and data[0].query == 'the cup' and check(home).broken == (told,)


@pytest.mark.parametrize('segmentation', [[[1., 1., 5., 5.]], [[1., 1., 5., 5., 3.]], [[1., 1., 5., float('nan'), 3., 3.]], 'x', None, [5], [[0., 0., 1e9, 0., 1., 1.]],
                                          dict(size=[H, W], counts='xyz'), dict(size=[W, H], counts=[W*H])])
def test_broken_instances_are_told(refcoco, segmentation):
    assert 'segmentation' in sentence(open_data(refcoco([ref()], [segmentation]), 'testA').__getitem__, 0)


def test_refs_that_are_no_list_and_missing_files(refcoco):
    home = refcoco(dict(a=1))
    assert 'not a list' in sentence(open_data, home, 'val') and len(check(home).broken) == 1
    (home/'instances.json').write_text('{}')
    assert 'annotations' in sentence(open_data, refcoco([ref()]) and (home/'instances.json').write_text('{}') and home, 'val')
    (home/'instances.json').unlink()
    assert 'instances.json' in sentence(open_data, home, 'val')


def test_refcoco_without_images(refcoco):
    home = refcoco([ref()])
    for p in (home/'images').iterdir(): p.unlink()
    assert 'does not exist' in sentence(open_data(home, 'testA').__getitem__, 0)
    (home/'images').rmdir()
    assert 'train2014' in sentence(open_data, home, 'testA') and len(check(home).broken) == 1


def test_a_forged_cache_leads_nowhere(refcoco):
    home = refcoco([ref()])
    open_data(home, 'testA')
    stamp = (home/'refs(unc).jsonl').read_text().splitlines()[0]
    forged = [dict(id=1, split='testA', image='../../../etc/passwd', segmentation=[], sentences=['x']), [], dict(split=5), dict(broken=5), 7]
    (home/'refs(unc).jsonl').write_text('\n'.join([stamp, *map(json.dumps, forged), '{']))
    data = open_data(home, 'testA')
    assert len(data) == 6 and 'leads out' in sentence(data.__getitem__, 0)
    for i in range(1, 6):
        with pytest.raises(BrokenRecord): data[i]


# one's own

def test_own_folder_by_hand(own):
    white = encoded((DISC*255).astype(np.uint8))
    home = own(dict(mask=encode(DISC)), dict(polygon=BOX, tags=dict(kind='box', n=3)), dict(mask='m.png'), dict(mask=[encode(DISC), 'm.png'], polygon=[BOX, BOX]),
               dict(mask=[]), dict(mask=encode(DISC), ignore='m.png'), dict(mask=dict(size=[H, W], counts=[0, W*H])), m=white)
    a, b, c, d, e, f, g = open_data(home, 'all')
    assert np.array_equal(a.mask, DISC) and b.mask.sum() == 16*11 and b.tags == dict(kind='box', n=3) and np.array_equal(c.mask, DISC)
    assert len(d.targets) == 4 and e.targets == () and np.array_equal(f.ignore, DISC) and g.mask.all() and np.array_equal(a.image, PHOTO)


@pytest.mark.parametrize('mode, white', [('1', True), ('L', 1), ('L', 255), ('I;16', 1), ('RGB', 255), ('P', 1)])
def test_masks_of_every_mode(own, mode, white):
    if mode == 'RGB': image = Image.fromarray(np.repeat((DISC*255).astype(np.uint8)[..., None], 3, 2))
    elif mode == 'P': image = Image.fromarray(DISC.astype(np.uint8), 'L').convert('P'); image.putpalette([0, 0, 0, 128, 0, 0])
    else: image = Image.fromarray((DISC*white).astype({'1': bool, 'L': np.uint8, 'I;16': np.uint16}[mode]))
    out = io.BytesIO()
    image.save(out, 'PNG')
    assert np.array_equal(open_data(own(dict(mask='m.png'), m=out.getvalue()), 'all')[0].mask, DISC)


def test_splits_of_ones_own(own):
    home = own(dict(mask=[], split='train'), dict(mask=[], split='val'), dict(mask=[], split='val'))
    assert [[s.id for s in open_data(home, split)] for split in ('train', 'val')] == [['r0'], ['r1', 'r2']]
    assert open_data(home, 'val').split_note is None
    assert 'use one of train, val' in sentence(open_data, home, 'test')
    assert 'use one of train, val' in sentence(open_data, home, 'test', limit=1)


@pytest.mark.parametrize('record, words', [
    (dict(masks=[]), 'field "masks" is unknown'), (dict(), 'field "mask" is missing'), (dict(mask=[], image='images/b.png'), 'does not exist'),
    (dict(mask=[], image='../a.png'), 'field "image" leads out'), (dict(mask=[], image='/etc/passwd'), 'leads out'), (dict(mask=[], image='images/../../a.png'), 'leads out'),
    (dict(mask=[], image='..\\a.png'), 'leads out'), (dict(mask=[], image='C:\\a.png'), 'leads out'), (dict(mask=[], image='\0'), 'does not exist'), (dict(mask=[], image='images'), 'is no file'),
    (dict(mask='../m.png'), 'leads out'), (dict(mask='m.jpg'), 'no PNG'), (dict(mask='.png'), 'does not exist'), (dict(mask='m.png'), 'is (30, 40) beside'),
    (dict(mask=''), 'no PNG'), (dict(mask=[None]), 'mask[0]'), (dict(mask=5), 'size'), (dict(mask=encode(DISC.T)), 'size'), (dict(mask=encode(DISC) | dict(counts='0')), 'add up'),
    (dict(mask=encode(DISC & False)), 'no pixel'), (dict(polygon=[[1, 1], [2, 2]]), '2 points'), (dict(polygon=[BOX, [[1, 1], [2, 2]]]), 'polygon[1]'),
    (dict(polygon=[[100, 100], [110, 100], [100, 110]]), 'no pixel'), (dict(polygon=[[1, 1, 1], [2, 2, 2], [3, 3, 3]]), 'polygon is not'), (dict(polygon='x'), 'polygon'),
    (dict(mask=[], tags=[]), 'field "tags"'), (dict(mask=[], tags=dict(a=[])), 'field "tags"'), (dict(mask=[], query=''), 'field "query"'), (dict(mask=[], id=5), 'field "id"'),
    ('{', 'JSON'), ('[]', 'object'), ('5', 'object')])
def test_broken_records_of_ones_own_are_told(own, record, words):
    home = own(dict(mask=[]), record, m=encoded(PHOTO.transpose(1, 0, 2)))
    data = open_data(home, 'all')
    told = sentence(data.__getitem__, 1)
    assert 'data.jsonl:2' in told and words in told and data[0].id == 'r0' and check(home).broken == (told,)


def test_own_data_is_utf8(own):
    home = own(dict(mask=[]))
    (home/'data.jsonl').write_bytes('{"id": "é"}'.encode('cp1252'))
    assert 'save it as UTF-8' in sentence(open_data(home, 'all').__getitem__, 0)


json_values = st.recursive(st.none() | st.booleans() | st.integers(-100, 100) | st.floats() | st.text(max_size=8),
                           lambda s: st.lists(s, max_size=4) | st.dictionaries(st.sampled_from(['size', 'counts', 'a']), s, max_size=3), max_leaves=8)


@given(st.sampled_from(Own.fields), json_values)
def test_any_value_in_any_field_is_read_or_told(tmp_path_factory, field, value):
    home = tmp_path_factory.getbasetemp()/'any'
    home.mkdir(exist_ok=True)
    (home/'a.png').write_bytes(encoded())
    (home/'data.jsonl').write_text(json.dumps(dict(id='a', image='a.png', query='q', mask=[]) | {field: value}))
    report = check(home)
    assert len(report.broken) + sum(c['samples'] for c in report.splits.values()) == 1


# opening and checking

def test_sequences_behave(own):
    data = open_data(own(*[dict(mask=[])]*3), 'all')
    assert len(data) == 3 and data[-1].id == 'r2' and data[np.int64(1)].id == 'r1' and [s.id for s in data] == ['r0', 'r1', 'r2']
    with pytest.raises(IndexError): data[3]
    assert len(pickle.loads(pickle.dumps(data))) == 3     # a worker gets it
    assert [s.id for s in open_data(own(*[dict(mask=[])]*3), 'all', limit=2)] == ['r0', 'r1']
    assert 'limit' in sentence(open_data, own(dict(mask=[])), 'all', limit=0)


def test_what_is_no_data_set_is_told(tmp_path, own):
    assert 'no known data set' in sentence(open_data, tmp_path, 'val')
    assert 'no known data set' in sentence(check, tmp_path)
    assert 'does not exist' in sentence(open_data, tmp_path/'nothing', 'val')
    assert 'option "level"' in sentence(open_data, own(dict(mask=[])), 'val', level='instance')
    (tmp_path/'data.jsonl').write_text('')
    assert 'no samples' in sentence(open_data, tmp_path, 'val')


def test_a_hub_name_is_found_in_the_cache(tmp_path, monkeypatch):
    "Laid out as huggingface_hub does, links into blobs and all; there is no network."
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path))
    repo = tmp_path/'datasets--Ricky06662--ReasonSeg_val'
    blob = parquet(repo/'blobs'/'abc', [hub_row()])
    data = repo/'snapshots'/('0'*40)/'data'
    data.mkdir(parents=True), (repo/'refs').mkdir()
    (repo/'refs'/'main').write_text('0'*40)
    (data/'test-00000-of-00001.parquet').symlink_to(blob)
    assert open_data('Ricky06662/ReasonSeg_val', 'val')[0].query == 'thing 0'
    assert 'not to be had from the hub' in sentence(open_data, 'Ricky06662/ReasonSeg_test', 'val')


def test_report_reads_well(reasonseg, own, tmp_path):
    root = reasonseg('a', [shape(BOX)], root=tmp_path/'below'/'rs')
    assert str(check(root)).splitlines()[1:] == ['val: 1 samples, 1 images, 1 targets, 0 without targets, 0 with ignore', 'nothing broken']
    seen = []
    check(root, lambda *a: seen.append(a))
    assert seen == [('val', 1, 1)]
    report = check(own(dict(id='same', mask=[]), dict(id='same', mask=[])))
    assert len(report.broken) == 1 and 'id "same"' in report.broken[0] and str(report).endswith(report.broken[0])


def test_memory_does_not_grow(own):
    "A thousand samples pass; what stays is less than one of their images."
    import tracemalloc
    data = open_data(own(*[dict(mask=[])]*1000), 'all')
    data[0]
    tracemalloc.start()
    for s in data: pass
    del s
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < PHOTO.nbytes*20
