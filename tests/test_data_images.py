"""图片：坏的、怪的、恶意的各得到一句话；少解、缓存、增强都说得出差多少。"""
import multiprocessing
import os
import random
import signal
import socket
import struct
import threading
import warnings
import zlib
from concurrent.futures import ProcessPoolExecutor
from io import BytesIO
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from vembed_nb.core import VembedError
from vembed_nb.data import images as room
from vembed_nb.data.augment import Augment, allowed, crop_box, drop_clauses, erase_patch, recolor, sample_captions, stream
from vembed_nb.data.images import DRAFT, ImageCache, broken_images, fit, image_size, open_image, resolve_image, to_rgb
from vembed_nb.data.tasks import Item, Record


def pattern(w=64, h=48, seed=0):
    "一张有粗有细的彩色图。"
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((w, h), Image.Resampling.BICUBIC)
    return Image.fromarray((np.asarray(coarse, int) + rng.integers(-12, 13, (h, w, 3))).clip(0, 255).astype(np.uint8))


def data(fmt="JPEG", im=None, **kw):
    buf = BytesIO()
    (im or pattern()).save(buf, fmt, **kw)
    return buf.getvalue()


def chunk(kind, body): return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
def png(w, h, bits=8, colour=2, body=b"\0" * 9999): return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, bits, colour, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


@pytest.fixture(autouse=True)
def no_hang():
    "任何一个测试卡住 60 秒就算失败。"
    def stop(*_): raise TimeoutError("卡住了")
    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


@pytest.fixture(autouse=True)
def forget(): room._SAID.clear()


# 一、坏的：文件内容 → 消息里要有的字
BAD = {
    "空": (b"", "空文件"), "一个字节": (b"\xff", "不是能识别"), "全零": (bytes(5000), "不是能识别"), "随机": (random.Random(0).randbytes(5000), "不是能识别"),
    "文字": ("我不是图片".encode(), "不是能识别"), "BOM 文字": ("\ufeff说明".encode(), "不是能识别"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"), "带声明的 SVG": (b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- x --><svg/>', "SVG"), "带 DOCTYPE 的 SVG": (b"<!DOCTYPE svg PUBLIC '-//W3C'>\n<svg/>", "SVG"),
    "PDF": (b"%PDF-1.7\n%\xe2\xe3", "PDF"), "网页": (b"\n<!DOCTYPE html>\n<html>404", "网页"), "网页二": (b"<html><body>", "网页"),
    "LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"), "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1", "HEIC"), "MP4": (b"\0\0\0\x18ftypisom\0\0\0\0", "视频"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "EPS"), "二进制 EPS": (b"\xc5\xd0\xd3\xc6" + bytes(40), "EPS"), "PSD": (b"8BPS\0\1" + bytes(40), "Photoshop"),
    "zip": (b"PK\x03\x04" + bytes(40), "压缩包"), "gzip": (b"\x1f\x8b\x08" + bytes(40), "压缩包"), "JSON": (b'{"error": "not found"}', "JSON"), "pickle": (b"\x80\x04\x95\x05", "不是能识别"),
    "JPEG 只有头": (data()[:2], "不是能识别"), "JPEG 切在头里": (data()[:100], ""), "JPEG 切在数据里": (data(im=pattern(200, 200))[:-3000], "截断"), "JPEG 少结尾一点": (data(im=pattern(200, 200))[:-300], "截断"),
    "PNG 切断": (data("PNG", pattern(200, 200))[:9000], "解码失败"), "PNG 校验错": (data("PNG")[:40] + b"XXXX" + data("PNG")[44:], ""), "PNG 没有数据": (png(8, 8, body=b""), "解码失败"), "PNG 行数不够": (png(64, 64, body=bytes(99)), "解码失败"),
    "PNG 零乘零": (png(0, 0), ""), "PNG 宽为零": (png(0, 9), ""), "PNG 炸弹": (png(60000, 60000), "大得不正常"), "PNG 中等炸弹": (png(12000, 12000), "上限"), "PNG 刚过上限": (png(9000, 8000), "上限"), "PNG 负尺寸": (png(2**32 - 1, 4), ""),
    "GIF 切断": (data("GIF")[:60], ""), "WebP 切断": (data("WEBP")[:60], ""), "BMP 切断": (data("BMP")[:400], "解码失败"), "BMP 尺寸造假": (data("BMP")[:18] + struct.pack("<ii", 50000, 50000) + data("BMP")[26:], "大得不正常"),
    "TIFF 切断": (data("TIFF")[:200], ""), "TIFF 浮点": (data("TIFF", Image.new("F", (4, 4), .5)), "F 模式"), "JPEG2000 切断": (data("JPEG2000")[:200], ""), "AVIF 切断": (data("AVIF")[:200], ""),
    "PPM 数据不够": (b"P6 99 99 255\n" + bytes(50), "解码失败"), "PPM 尺寸不是数": (b"P6 xx 99 255\n", ""), "PPM 炸弹": (b"P6 99999 99999 255\n", "大得不正常"), "ICO 坏": (b"\0\0\1\0\1\0" + bytes(20), ""),
    "开头是 EPS 的 JPEG": (b"%!PS" + data(), "EPS"), "解压炸弹的文字块": (data("PNG")[:33] + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000))) + data("PNG")[33:], ""),
}


@pytest.mark.parametrize("side", (None, 16), ids=("全解", "少解"))
@pytest.mark.parametrize("name", BAD)
def test_bad_files(name, side, tmp_path):
    content, word = BAD[name]
    (tmp_path / "x.jpg").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(VembedError) as e: open_image("x.jpg", tmp_path, side=side)
        assert "x.jpg" in str(e.value) and word in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 400, str(e.value)
        assert "x.jpg" in broken_images(["x.jpg"], tmp_path)


@pytest.mark.parametrize("name", [n for n, (c, _) in BAD.items() if c])
def test_bad_bytes_in_memory(name):
    "同样的字节，由 PIL 从内存里打开：要么 PIL 自己就打不开，要么 open_image 给一句话，不会是 OSError。"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try: im = Image.open(BytesIO(BAD[name][0]))
        except Exception: return
        with pytest.raises(VembedError): open_image(im)


PATHS = {"不存在": ("no.jpg", "不存在"), "外面": ("../a.jpg", "之外"), "绕到外面": ("sub/../../a.jpg", "之外"), "绝对路径": ("/etc/hostname", "之外"), "空字符": ("a\0.jpg", "空字符"), "文件夹": ("sub", "文件夹"), "根目录自己": (".", "文件夹"), "空串": ("", "文件夹"),
         "链接到外面": ("out.jpg", "之外"), "链接的文件夹": ("outdir/hostname", "之外"), "断了的链接": ("gone.jpg", "不存在"), "自己指自己": ("loop.jpg", ""), "管道": ("pipe.jpg", "管道"), "套接字": ("sock.jpg", "套接字"), "文件当文件夹": ("ok.jpg/x.jpg", "不存在"),
         "太长": ("长" * 300 + ".jpg", "打不开"), "很深": ("a/" * 3000 + "x.jpg", ""), "网址": ("https://example.com/a.jpg", "网址"), "data": ("data:image/png;base64,AAAA", "网址"), "file 网址": ("file:///etc/hostname", ""), "换行": ("a\n.jpg", "不存在"), "波浪号": ("~/a.jpg", "不存在")}


@pytest.fixture
def odd(tmp_path):
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "ok.jpg").write_bytes(data())
    (root / "out.jpg").symlink_to("/etc/hostname")
    (root / "outdir").symlink_to("/etc")
    (root / "gone.jpg").symlink_to(root / "nothing")
    (root / "loop.jpg").symlink_to(root / "loop.jpg")
    (root / "in.jpg").symlink_to(root / "ok.jpg")
    os.mkfifo(root / "pipe.jpg")
    here = os.getcwd()
    os.chdir(root)
    s = socket.socket(socket.AF_UNIX)
    s.bind("sock.jpg")
    os.chdir(here)
    yield root
    s.close()


@pytest.mark.parametrize("name", PATHS)
def test_bad_paths(name, odd):
    path, word = PATHS[name]
    for f in (open_image, image_size, lambda p, r: ImageCache(odd.parent / "cache").open(p, r)):
        with pytest.raises(VembedError, match=word or ".") as e: f(path, odd)
        assert len(str(e.value)) < 20_000 and "\n" not in str(e.value)


@pytest.mark.parametrize("what", (None, 3, b"\xff\xd8\xff", ["a.jpg"], {"bytes": b""}, np.zeros((4, 4, 3), np.uint8)), ids=lambda w: type(w).__name__)
def test_not_a_picture_at_all(what, tmp_path):
    for f in (open_image, image_size, ImageCache(tmp_path / "cache").open):
        with pytest.raises(VembedError, match=type(what).__name__): f(what, tmp_path)


def test_devices_are_not_opened():
    "设备文件没有尽头，也不是图片。"
    for name in ("zero", "null", "full", "urandom"):
        if os.path.exists(f"/dev/{name}"):
            with pytest.raises(VembedError, match="不是普通文件"): open_image(name, "/dev")


def test_good_paths(odd):
    assert open_image("in.jpg", odd) == open_image("./sub/../ok.jpg", odd) == open_image(odd / "ok.jpg", odd) and resolve_image("ok.jpg", odd) == odd / "ok.jpg"


@pytest.mark.skipif(os.geteuid() == 0, reason="root 读得了一切")
def test_unreadable(odd):
    os.chmod(odd / "ok.jpg", 0)
    with pytest.raises(VembedError, match="打不开"): open_image("ok.jpg", odd)


def test_a_sparse_giant_is_refused_quickly(tmp_path):
    with open(tmp_path / "x.jpg", "wb") as f: f.truncate(40 * 2**30)
    with pytest.raises(VembedError, match="不是能识别"): open_image("x.jpg", tmp_path)


@pytest.mark.parametrize("fmt", ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "TGA", "PCX"))
def test_fuzz(fmt, tmp_path):
    "好图改几个字节、切一刀：要么打开，要么一句话；别的异常都不许有。"
    good, rng = data(fmt, pattern(32, 32)), random.Random(1)
    for _ in range(60):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 6)): bad[rng.randrange(len(bad))] = rng.randrange(256)
        bad = bytes(bad[:rng.randint(1, len(bad))]) if rng.random() < .4 else bytes(bad)
        (tmp_path / "x").write_bytes(bad)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try: assert open_image("x", tmp_path, side=rng.choice((None, 8))).mode == "RGB"
            except VembedError: pass


# 二、怪的：照样打开，而且颜色对
MODES = {"1": 1, "L": 100, "P": 3, "RGB": (200, 30, 40), "RGBA": (200, 30, 40, 255), "LA": (100, 255), "CMYK": (10, 200, 90, 5), "YCbCr": (90, 100, 200), "HSV": (3, 200, 200), "LAB": (100, 30, 40), "I": 40000, "I;16": 40000, "RGBX": (200, 30, 40, 0), "RGBa": (100, 15, 20, 128), "La": (50, 128)}


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode):
    got = to_rgb(Image.new(mode, (5, 4), MODES[mode]))
    assert got.mode == "RGB" and got.size == (5, 4) and not got.info
    if mode in ("RGB", "RGBA", "RGBX"): assert got.getpixel((0, 0)) == (200, 30, 40)
    if mode.startswith("I"): assert got.getpixel((0, 0)) == (156,) * 3
    if mode == "RGBa": assert abs(got.getpixel((0, 0))[0] - (200 * .5 + 127)) < 3


@pytest.mark.parametrize("fmt,mode", [("PNG", "RGBA"), ("PNG", "LA"), ("WEBP", "RGBA"), ("TIFF", "RGBA"), ("GIF", "P"), ("PNG", "P"), ("PNG", "RGB"), ("PNG", "L")])
def test_transparent_is_white(fmt, mode):
    if mode in ("RGBA", "LA"): im, kw = Image.new(mode, (4, 4), (9, 0) if mode == "LA" else (9, 9, 9, 0)), {}
    else: im, kw = Image.new(mode, (4, 4), 0), {"transparency": (0, 0, 0) if mode == "RGB" else 0}
    assert open_image(Image.open(BytesIO(data(fmt, im, **kw)))).getpixel((1, 1)) == (255, 255, 255)


def test_cmyk_jpeg_and_16_bit(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "c.jpg", quality=95)
    r, g, b = open_image("c.jpg", tmp_path).getpixel((8, 8))
    assert r > 240 and g < 15 and b < 15
    assert open_image("c.jpg", tmp_path, side=4).size == (8, 8)
    (tmp_path / "deep.png").write_bytes(png(2, 1, 16, 2, b"\0" + struct.pack(">6H", 65535, 0, 0, 0, 32768, 0)))
    assert [open_image("deep.png", tmp_path).getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (0, 128, 0)]


def test_wrong_suffix(tmp_path):
    for fmt in ("PNG", "WEBP", "GIF", "BMP", "AVIF"):
        (tmp_path / "x.jpg").write_bytes(data(fmt))
        assert open_image("x.jpg", tmp_path).size == (64, 48)


@pytest.mark.parametrize("fmt", ("GIF", "PNG", "WEBP", "TIFF"))
def test_animated_uses_the_first_frame_and_says_so_once(fmt, tmp_path):
    frames = [Image.new("RGB", (16, 16), c) for c in ("red", "blue", "lime")]
    frames[0].save(tmp_path / "x", fmt, save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match="3 帧"): assert open_image("x", tmp_path).getpixel((8, 8))[0] > 240
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_image("x", tmp_path)


def test_two_pictures_in_one_jpeg_are_not_an_animation(tmp_path):
    "手机存的 MPO：主图之外还有景深、增益图。"
    pattern().save(tmp_path / "x.jpg", "MPO", save_all=True, append_images=[pattern(seed=1)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image("x.jpg", tmp_path).size == (64, 48) and open_image("x.jpg", tmp_path, side=8).size == (16, 12)


@pytest.mark.parametrize("way", range(1, 9))
def test_orientation(way, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = way
    pattern().save(tmp_path / "x.jpg", exif=exif)
    want = ImageOps.exif_transpose(Image.open(tmp_path / "x.jpg")).convert("RGB")
    got = open_image("x.jpg", tmp_path)
    assert got.tobytes() == want.tobytes() and got.size == want.size == image_size("x.jpg", tmp_path) == image_size(Image.open(tmp_path / "x.jpg"))
    assert open_image(got) == got == to_rgb(got), "转正了两次"
    assert open_image("x.jpg", tmp_path, side=8).size == tuple(n // 4 for n in want.size)


@pytest.mark.parametrize("exif", (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(50)))
def test_broken_exif_is_ignored(exif, tmp_path):
    (tmp_path / "x.jpg").write_bytes(data(exif=exif))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert open_image("x.jpg", tmp_path).size == (64, 48) == image_size("x.jpg", tmp_path)


def test_lazy_pictures_stay_lazy():
    "内存里没有解码的图：结果相同，自己仍然没有解码，几个线程一起用也不打架。"
    raw = data(im=pattern(400, 300))
    lazy = Image.open(BytesIO(raw))
    want = open_image(Image.open(BytesIO(raw)))
    out, threads = [], []
    for _ in range(8): threads.append(threading.Thread(target=lambda: out.append(open_image(lazy).tobytes())))
    for t in threads: t.start()
    for t in threads: t.join()
    assert len(out) == 8 and set(out) == {want.tobytes()} and lazy.tile
    assert open_image(lazy, side=50).size == (100, 75) and lazy.size == (400, 300)
    lazy.load()
    assert open_image(lazy, side=50).size == (400, 300)


def test_pictures_from_pil(tmp_path):
    im = pattern()
    got = open_image(im)
    assert got == im and got is not im
    with pytest.raises(VembedError, match="没有像素"): open_image(Image.new("RGB", (0, 5)))
    pattern().save(tmp_path / "x.png")
    closed = Image.open(tmp_path / "x.png")
    closed.close()
    with pytest.raises(VembedError): open_image(closed)
    with pytest.raises(VembedError, match="上限"): open_image(Image.open(BytesIO(data())), max_pixels=100)
    assert open_image(pattern(), max_pixels=100).size == (64, 48)


def test_warnings_as_errors(tmp_path):
    "`-W error` 时，PIL 的解压炸弹提醒也是一句话。"
    (tmp_path / "x.png").write_bytes(png(12000, 12000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(VembedError, match="大得不正常"): open_image("x.png", tmp_path)


# 三、少解
@pytest.mark.parametrize("w,h,side,want", [(1024, 768, 224, (512, 384)), (1024, 768, 256, (512, 384)), (1024, 768, 257, (1024, 768)), (1024, 768, 64, (128, 96)), (1024, 768, 65, (256, 192)), (1023, 767, 224, (512, 384)), (300, 200, 224, (300, 200)), (64, 48, 1, (8, 6)), (768, 1024, 224, (384, 512)), (3000, 100, 224, (3000, 100))])
def test_draft_sizes(w, h, side, want, tmp_path):
    pattern(w, h).save(tmp_path / "x.jpg")
    got = open_image("x.jpg", tmp_path, side=side)
    assert got.size == want and (got.size == (w, h) or min(got.size) >= DRAFT * side)


def test_draft_changes_little_and_only_jpeg(tmp_path):
    im = pattern(1024, 768)
    im.save(tmp_path / "x.jpg", quality=92), im.save(tmp_path / "x.png")
    small = lambda side: np.asarray(open_image("x.jpg", tmp_path, side=side).resize((224, 224), Image.Resampling.BICUBIC), int)
    assert np.abs(small(224) - small(None)).mean() < 1.5
    assert open_image("x.png", tmp_path, side=8) == open_image("x.png", tmp_path) and open_image("x.jpg", tmp_path).size == (1024, 768)
    assert open_image("x.jpg", tmp_path).tobytes() == Image.open(tmp_path / "x.jpg").convert("RGB").tobytes()


@pytest.mark.parametrize("side", (0, -3, 1.5, "224", (224, 224)))
def test_bad_side(side, tmp_path):
    pattern().save(tmp_path / "x.jpg")
    with pytest.raises(VembedError, match="side"): open_image("x.jpg", tmp_path, side=side)


@pytest.mark.parametrize("progressive", (False, True))
def test_draft_sees_every_cut(progressive, tmp_path):
    "在哪里切断，少解都和全解一样查得出来。"
    whole = data(im=pattern(256, 256), quality=90, progressive=progressive)
    for n in np.linspace(20, len(whole) - 2, 40).astype(int):
        (tmp_path / "x.jpg").write_bytes(whole[:n])
        verdicts = []
        for side in (None, 1, 64):
            try: verdicts.append(bool(open_image("x.jpg", tmp_path, side=side)))
            except VembedError: verdicts.append(False)
        assert len(set(verdicts)) == 1, (n, verdicts)


def test_broken_images(tmp_path):
    for i in range(6): pattern(seed=i).save(tmp_path / f"{i}.jpg")
    (tmp_path / "bad.jpg").write_bytes(data()[:-400])
    got = broken_images([*(f"{i}.jpg" for i in range(6)), "bad.jpg", "bad.jpg", "no.jpg", pattern()], tmp_path)
    assert set(got) == {"bad.jpg", "no.jpg"} and "不存在" in got["no.jpg"]


# 四、缓存
@pytest.fixture
def shelf(tmp_path):
    (tmp_path / "im").mkdir()
    for i in range(12): pattern(160, 120, i).save(tmp_path / "im" / f"{i}.jpg")
    return SimpleNamespace(root=tmp_path / "im", cache=tmp_path / "cache", size=lambda: sum(p.stat().st_size for p in (tmp_path / "cache").rglob("*.pix")))


def test_fit_is_what_the_processors_do():
    import transformers as tf
    for size in ((100, 77), (77, 100), (333, 55), (64, 64)):
        p = tf.CLIPImageProcessorPil(size={"shortest_edge": 48}, do_center_crop=False, do_rescale=False, do_normalize=False)
        want = p(pattern(*size), return_tensors="np")["pixel_values"][0]
        assert np.array_equal(np.asarray(fit(pattern(*size), 48)).transpose(2, 0, 1), want)
    assert fit(pattern(), (9, 7)).size == (9, 7) and fit(pattern(), 48).size == (64, 48)
    for size in (0, (0, 4)):
        with pytest.raises(VembedError, match="没有像素"): fit(pattern(), size)


@pytest.mark.parametrize("size", (32, (40, 20), 500))
def test_cache_is_lossless(shelf, size):
    cache = ImageCache(shelf.cache)
    for _ in range(2):
        for i in range(12): assert cache.open(f"{i}.jpg", shelf.root, size) == fit(open_image(f"{i}.jpg", shelf.root), size)
    assert (cache.hits, cache.misses) == (12, 12)
    assert ImageCache(shelf.cache).open("3.jpg", shelf.root, size) == cache.open("3.jpg", shelf.root, size)


def test_cache_knows_content_not_names(shelf):
    cache = ImageCache(shelf.cache)
    first = cache.open("0.jpg", shelf.root, 32)
    (shelf.root / "copy.jpg").write_bytes((shelf.root / "0.jpg").read_bytes())
    assert cache.open("copy.jpg", shelf.root, 32) == first == cache.open(Image.open(BytesIO((shelf.root / "0.jpg").read_bytes())), "", 32) and (cache.hits, cache.misses) == (2, 1)
    stamp = (shelf.root / "0.jpg").stat()
    pattern(160, 120, 99).save(shelf.root / "0.jpg")
    os.utime(shelf.root / "0.jpg", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert cache.open("0.jpg", shelf.root, 32) == fit(open_image("0.jpg", shelf.root), 32) != first
    keys = [dict(size=32), dict(size=33), dict(size=(32, 24)), dict(size=32, resample=Image.Resampling.BILINEAR)]
    assert len({cache.open("1.jpg", shelf.root, **k).tobytes() for k in keys}) >= 3 and cache.misses == 6
    assert cache.open(pattern(), "", 32).size == (42, 32) and cache.misses == 6  # 已经解码的不进缓存


@pytest.mark.parametrize("damage", ("空", "切断", "改一位", "改尺寸", "垃圾", "文件夹"))
def test_damaged_entry_is_a_miss(shelf, damage):
    cache = ImageCache(shelf.cache)
    want = cache.open("0.jpg", shelf.root, 32)
    (entry,) = shelf.cache.rglob("*.pix")
    raw = entry.read_bytes()
    if damage == "文件夹": entry.unlink(), entry.mkdir()
    else: entry.write_bytes({"空": b"", "切断": raw[:-1], "改一位": raw[:99] + bytes([raw[99] ^ 1]) + raw[100:], "改尺寸": raw[:8] + struct.pack("<II", 2**31, 2**31) + raw[16:], "垃圾": b"x" * 100}[damage])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert cache.open("0.jpg", shelf.root, 32) == want == cache.open("0.jpg", shelf.root, 32)
    assert cache.misses == (3 if damage == "文件夹" else 2)


def test_cache_is_bounded_and_drops_the_oldest(shelf):
    cache = ImageCache(shelf.cache, max_bytes=40_000)  # 一个条目 42×32×3 + 20，装得下八九个
    for i in range(12):
        cache.open(f"{i}.jpg", shelf.root, 32)
        assert shelf.size() <= 40_000
        for n, p in enumerate(sorted(shelf.cache.rglob("*.pix"), key=lambda p: p.stat().st_mtime_ns)): os.utime(p, ns=(n, n))
    cache.hits = 0
    cache.open("11.jpg", shelf.root, 32)
    assert cache.hits == 1, "最新的还在"
    misses = cache.misses
    cache.open("0.jpg", shelf.root, 32)
    assert cache.misses == misses + 1, "最旧的不在了"
    big = ImageCache(shelf.cache.parent / "tiny", max_bytes=2000)
    assert big.open("0.jpg", shelf.root, 32).size == (42, 32) and not list((shelf.cache.parent / "tiny").rglob("*.pix"))


def test_cache_touches_only_its_own_files(shelf, tmp_path):
    with pytest.raises(VembedError, match="别的东西"): ImageCache(shelf.root)
    (tmp_path / "file").write_text("x")
    with pytest.raises(VembedError): ImageCache(tmp_path / "file")
    for n in (0, -1):
        with pytest.raises(VembedError, match="max_bytes"): ImageCache(shelf.cache, n)
    cache = ImageCache(shelf.cache, 15_000)
    (shelf.cache / "我的.jpg").write_bytes(bytes(99_999))
    old = shelf.cache / "ab" / ".x.pix.tmp"
    old.parent.mkdir()
    old.write_bytes(b"x"), os.utime(old, (1, 1))
    for i in range(12): cache.open(f"{i}.jpg", shelf.root, 32)
    assert (shelf.cache / "我的.jpg").exists() and not old.exists() and shelf.size() <= 15_000
    assert not [p for p in shelf.cache.rglob(".*") if p.is_file()]


def test_cache_that_cannot_be_written(shelf, monkeypatch):
    "磁盘满了：说一次，图照样给。"
    from contextlib import contextmanager

    @contextmanager
    def full(path):
        raise OSError(28, "No space left on device")
        yield
    cache = ImageCache(shelf.cache)
    monkeypatch.setattr(room, "atomic_file", full)
    with pytest.warns(UserWarning, match="写不进去"): assert cache.open("0.jpg", shelf.root, 32) == fit(open_image("0.jpg", shelf.root), 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.open("1.jpg", shelf.root, 32)


def use_cache(job):
    "一个进程：乱序地读全部的图，核对每一张。"
    folder, root, seed = job
    cache, order = ImageCache(folder, 60_000), list(range(12)) * 3
    random.Random(seed).shuffle(order)
    for i in order:
        if cache.open(f"{i}.jpg", root, 32).tobytes() != fit(open_image(f"{i}.jpg", root), 32).tobytes(): return -1
    return cache.hits


def test_cache_with_several_processes(shelf):
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("fork")) as pool: hits = list(pool.map(use_cache, [(shelf.cache, shelf.root, s) for s in range(3)]))
    assert min(hits) >= 0 and sum(hits) > 0 and shelf.size() <= 60_000 * (1 + 2 / 16)


# 五、增强
shop = pattern(120, 90)


def test_augment_is_off_by_default():
    item = Item("左边的红杯子", shop)
    assert Augment()(item, 0, 0) is item and not Augment().on_images
    rec = Record(Item("a"), [Item(image="没有这个文件.jpg")])
    assert Augment().record(rec, 0, 0) == rec  # 关着的时候连图也不打开


FULL = dict(side=48, crop=.5, flip=.5, color=(.3, .3, .3, .1), erase=.5, guard=False)


def many(seed, epochs=2, n=6): return [Augment(**FULL, seed=seed)(Item(image=shop), e, i).image.tobytes() for e in range(epochs) for i in range(n)]


def test_same_numbers_same_picture_in_any_process():
    here = many(3)
    np.random.seed(1), random.seed(1)
    assert many(3) == here and len(set(here)) == 12 and set(many(4)).isdisjoint(here)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool: assert pool.submit(many, 3).result() == here


def test_turning_one_off_leaves_the_others():
    "随机数总是一样多：关掉变色，裁剪的框不变。"
    box = lambda **kw: np.asarray(Augment(**{**FULL, "erase": 0, "color": 0, **kw})(Item(image=shop), 0, 5).image)
    with_colour = Augment(**{**FULL, "erase": 0, "color": (.3, 0, 0, 0)})(Item(image=shop), 0, 5).image
    a, b = box().mean(2).ravel(), np.asarray(with_colour).mean(2).ravel()
    assert np.corrcoef(a, b)[0, 1] > .97


@pytest.mark.parametrize("text,flip,color", [("左边的杯子", 0, 1), ("红色的杯子", 1, 0), ("红色的杯子在右边", 0, 0), ("一只杯子", 1, 1), ("a red mug", 1, 0), ("mug on the LEFT", 0, 1), ("印着字的书包", 0, 1), ("a sign that says stop", 0, 1),
                                             ("leftover", 1, 1), ("bored cat", 1, 1), ("greyhound", 1, 1), ("a gray cat", 1, 0), ("light-colored", 1, 0), ("深夜", 1, 0), ("", 1, 1)])
def test_guard(text, flip, color): assert allowed([text]) == (bool(flip), bool(color))


@pytest.mark.parametrize("text,changes", [("左边的红杯子", False), ("一个东西", True)])
def test_record_guards_every_picture(text, changes):
    "查询的文字管住正例和反例的图。"
    rec = Record(Item(text), [Item(image=shop)], [Item(image=shop)], "q", ["p"], ["n"], "g", "第 1 行")
    got = Augment(flip=1, color=(0, 0, 0, .5), seed=2).record(rec, 0, 0)
    assert [(d.image.tobytes() != shop.tobytes()) for d in got.positives + got.negatives] == [changes] * 2
    assert (got.query_id, got.positive_ids, got.negative_ids, got.group, got.where) == ("q", ["p"], ["n"], "g", "第 1 行")
    loose = Augment(flip=1, guard=False).record(rec, 0, 0)
    assert loose.positives[0].image.tobytes() == ImageOps.mirror(shop).tobytes()


def test_record_texts():
    long = "杯子，有盖，有把，有花。"
    how = Augment(clauses=1)
    rec = Record(Item(long), [Item(long)], [Item(long)])
    got = how.record(rec, 0, 0)
    assert (got.query.text, got.positives[0].text, got.negatives[0].text) == ("杯子", "杯子", long)
    composed = Record(Item(long, shop), [Item(image=shop)])
    assert how.record(composed, 0, 0).query.text == long and how.record(composed, 0, 0).positives[0].image is shop


def test_pictures_of_one_record_get_their_own_numbers():
    rec = Record(Item(image=(shop, shop)), [Item(image=shop), Item(image=shop)])
    got = Augment(side=48, crop=.3, seed=1).record(rec, 0, 0)
    assert len({im.tobytes() for i in (got.query, *got.positives) for im in i.images}) == 4 and len(got.query.images) == 2


def test_paths_and_errors(tmp_path):
    shop.save(tmp_path / "a.jpg")
    assert Augment(side=20, crop=.9)(Item(image="a.jpg"), 0, 0, tmp_path).image.size == (20, 20) and Augment(side=20)(Item(image="a.jpg"), 0, 0, tmp_path).image.size == (26, 20)
    with pytest.raises(VembedError, match="不存在"): Augment(flip=1)(Item(image="b.jpg"), 0, 0, tmp_path)
    for bad in ((-1, 0), (0, -1)):
        with pytest.raises(VembedError, match="≥ 0"): Augment(flip=1)(Item(image="a.jpg"), *bad, tmp_path)


@pytest.mark.parametrize("wrong", (dict(flip=-.1), dict(flip=2), dict(flip=True), dict(erase="x"), dict(clauses=None), dict(crop=0), dict(crop=1.5), dict(color=(1, 1)), dict(color=(0, 0, 0, .6)), dict(color=-1), dict(side=0), dict(side=1.5), dict(flip=float("nan"))), ids=str)
def test_bad_settings(wrong):
    with pytest.raises(VembedError): Augment(**wrong)


@pytest.mark.parametrize("w,h", [(400, 300), (30, 900), (900, 30), (1, 1), (3, 2)])
def test_crop_boxes_are_inside(w, h):
    for i in range(100):
        x0, y0, x1, y1 = crop_box(stream(0, 0, i), w, h)
        assert 0 <= x0 < x1 <= w and 0 <= y0 < y1 <= h
        assert erase_patch(Image.new("RGB", (w, h)), stream(0, 0, i)).size == (w, h)


def test_recolor():
    kornia = pytest.importorskip("kornia")
    assert kornia.__version__ and recolor(shop) == shop and np.ptp(np.asarray(recolor(shop, saturation=0), int), axis=2).max() <= 1
    for hue, want in ((1 / 3, (0, 255, 0)), (-1 / 3, (0, 0, 255)), (.5, (0, 255, 255))): assert recolor(Image.new("RGB", (2, 2), "red"), hue=hue).getpixel((0, 0)) == want


def test_other_peoples_augmentations_leave_the_rng_alone():
    kornia, torch = pytest.importorskip("kornia"), pytest.importorskip("torch")
    how = Augment(more=(kornia.augmentation.RandomGaussianBlur((3, 3), (.5, 2.), p=.7),), seed=1)
    before = torch.random.get_rng_state()
    a = [how(Item(image=shop), 0, i).image.tobytes() for i in range(5)]
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(9)
    assert a == [how(Item(image=shop), 0, i).image.tobytes() for i in range(5)] and len(set(a)) > 1


def test_without_kornia(monkeypatch):
    "没有装 kornia：裁剪、翻转、擦除照用，变色在开训之前就说要装什么。"
    import sys
    monkeypatch.setitem(sys.modules, "kornia.enhance", None)
    assert Augment(side=20, crop=.5, flip=1, erase=1)(Item(image=shop), 0, 0).image.size == (20, 20)
    with pytest.raises(VembedError, match=r"vembed-nb\[augment\]"): Augment(color=.2)


@pytest.mark.parametrize("text", ("杯子", "a mug", "1,000 mugs", "", "，，", "杯子，有盖。", "A mug. It is red, and big; new."))
def test_drop_clauses(text):
    for e in range(20):
        got = drop_clauses(text, stream(0, e, 0), .5)
        assert got or not text.strip("，")
        rest = iter(text)
        assert all(c in rest for c in got if c != " "), "剩下的字次序不变"
    assert drop_clauses(text, stream(0, 0, 0), 0) == text


def test_sample_captions():
    recs = [Record(Item(f"{i} {j}"), [Item(image=f"{i}.jpg")]) for i in range(7) for j in range(1 + i % 3)]
    chosen = sample_captions(recs, 3, seed=1)
    assert [recs[i].positive_ids[0] for i in chosen] == [f"{i}.jpg" for i in range(7)] and chosen.tolist() == sample_captions(recs, 3, seed=1).tolist()
    keys = SimpleNamespace(query=np.arange(len(recs)), positive=np.array([int(r.positive_ids[0][0]) for r in recs]), offsets=np.arange(len(recs) + 1))
    assert sample_captions(SimpleNamespace(keys=lambda: keys), 3, seed=1).tolist() == chosen.tolist()
    assert len(sample_captions(recs, 0, by="query")) == len(recs)
    with pytest.raises(VembedError, match="by"): sample_captions(recs, 0, by="image")


def test_a_dangerous_flag_of_pil_is_said(tmp_path, monkeypatch):
    "别的库打开 LOAD_TRUNCATED_IMAGES 之后，截断的图查不出来：说一次。"
    pattern().save(tmp_path / "x.jpg")
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.warns(UserWarning, match="LOAD_TRUNCATED_IMAGES"): open_image("x.jpg", tmp_path)
