import pytest
import torch

from mtnrec import products
from mtnrec.products import choose_products

CPU = torch.device("cpu")


@pytest.fixture
def setting():
    if not hasattr(torch.backends.mkldnn, "matmul"):
        pytest.skip("torch has the setting since 2.9")
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    yield matmul
    matmul.fp32_precision = before


@pytest.fixture
def amd(monkeypatch):
    monkeypatch.setattr(products, "_is_amd", lambda: True)


@pytest.mark.parametrize("shape", [(1, 5, 3), (2048, 201, 512), (256, 2048, 512), (2176, 512, 64)])
def test_products_are_those_of_float32_on_any_processor(amd, setting, shape):
    choose_products(CPU)  # on a processor that rounds it changes nothing
    rows, inner, columns = shape
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    exact = a.double() @ b.double()
    error = torch.finfo(torch.float32).eps * inner**0.5

    for product in (a @ b, (b.T @ a.T).T, torch.stack([a, a]) @ b, torch.addmm(b[0] * 0, a, b)):
        assert ((product - exact).abs() <= error * (a.abs() @ b.abs())).all()


def test_a_processor_that_would_round_to_bfloat16_is_left_as_it_is(amd, setting, monkeypatch):
    monkeypatch.setattr(
        products, "_multiply", lambda a, b: (a.bfloat16() @ b.bfloat16()).to(torch.float32)
    )

    assert not choose_products(CPU)
    assert setting.fp32_precision == "ieee"


@pytest.mark.parametrize(("vendor", "device"), [("Intel", "cpu"), ("AMD", "cuda")])
def test_other_processors_and_devices_are_left_as_they_are(setting, monkeypatch, vendor, device):
    monkeypatch.setattr(products, "_is_amd", lambda: vendor == "AMD")

    assert not choose_products(torch.device(device))
    assert setting.fp32_precision == "ieee"


def test_the_choice_leaves_random_numbers_alone(amd, setting):
    before = torch.get_rng_state()
    choose_products(CPU)

    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("vendor_id\t: AuthenticAMD\n", True), ("vendor_id\t: GenuineIntel\n", False)],
)
def test_the_vendor_is_read_from_what_linux_says(monkeypatch, tmp_path, text, expected):
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(products, "Path", lambda _: tmp_path / "cpuinfo")

    assert products._is_amd() is expected


def test_the_vendor_is_read_from_what_windows_says(monkeypatch, tmp_path):
    monkeypatch.setattr(products, "Path", lambda _: tmp_path / "absent")
    monkeypatch.setattr("platform.processor", lambda: "AMD64 Family 26 Model 2, AuthenticAMD")

    assert products._is_amd()
