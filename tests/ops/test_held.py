"""A process-wide setting that several threads hold."""

from __future__ import annotations

import threading

import torch

from hart_infer.ops.held import Held, no_convolution_tf32, without_cudnn_attention


def test_the_last_to_leave_restores_it() -> None:
    setting = {"value": "old"}
    held = Held(lambda: setting["value"], lambda value: setting.update(value=value), "new")
    first_is_out, second_is_in = threading.Event(), threading.Event()
    seen = []

    def second() -> None:
        with held:
            second_is_in.set()
            first_is_out.wait(10)
            seen.append(setting["value"])

    thread = threading.Thread(target=second)
    with held:
        thread.start()
        assert second_is_in.wait(10)
    first_is_out.set()
    thread.join()
    assert seen == ["new"]
    assert setting["value"] == "old"


def test_an_error_inside_restores_it() -> None:
    setting = {"value": 1}
    held = Held(lambda: setting["value"], lambda value: setting.update(value=value), 2)
    try:
        with held:
            raise KeyError
    except KeyError:
        pass
    assert setting["value"] == 1


def test_torch_s_settings_are_set_and_restored() -> None:
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.cudnn_sdp_enabled()
    with no_convolution_tf32, without_cudnn_attention(torch.device("cuda")):
        assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.cudnn_sdp_enabled()) == (False, False)
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.cudnn_sdp_enabled()) == before
