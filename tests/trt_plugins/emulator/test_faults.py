"""Broken kernels, which the emulator must report: what, where, and by which thread."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from optframe.types import KernelLaunch, TensorInfo
from optframe_trt import emulator, nvrtc
from optframe_trt.emulator import Checks, KernelFault, Unsupported

Array = np.ndarray[Any, Any]
Emulate = Callable[..., list[Array]]

FLOATS = TensorInfo((64,), "float32")


def kernel(body: str, parameters: str = "const float* x, float* y") -> str:
    return f'extern "C" __global__ void k({parameters}) {{ int t = threadIdx.x; {body} }}'


@pytest.fixture
def fault(emulate: Emulate) -> Callable[..., str]:
    """`fault(body, ...)` -> the message of the fault that a kernel of 64 floats is reported for."""

    def run(body: str, **options: Any) -> str:
        with pytest.raises(KernelFault) as caught:
            emulate(kernel(body), [np.ones(64, np.float32)], [FLOATS], **{"block": 64, **options})
        assert str(caught.value).startswith("the kernel k, block ")
        return str(caught.value)

    return run


Fault = Callable[..., str]


class TestGlobalMemory:
    @pytest.mark.parametrize(
        ("index", "thread", "where"),
        [
            ("t + 1", 63, "writes 4 bytes out of bounds: 0 bytes past the end of output 0"),
            ("t - 3", 0, "writes 4 bytes out of bounds: 12 bytes before output 0"),
            ("t * 3", 22, "writes 4 bytes out of bounds: 8 bytes past the end of output 0"),
            ("(1ll << 50) * (t == 40)", 40, "where no tensor is"),
        ],
    )
    def test_writing_out_of_bounds(self, fault: Fault, index: str, thread: int, where: str) -> None:
        message = fault(f"y[{index}] = x[t];")
        assert f"block (0, 0, 0), thread ({thread}, 0, 0): 'st.global." in message
        assert where in message

    def test_reading_out_of_bounds_in_some_block(self, fault: Fault) -> None:
        message = fault("y[t] = x[t + blockIdx.x * 60];", grid=3)
        assert "block (1, 0, 0), thread (4, 0, 0): 'ld.global" in message
        assert "reads 4 bytes out of bounds: 0 bytes past the end of input 0" in message

    def test_a_null_pointer(self, fault: Fault) -> None:
        assert "at the address 0x0, where no tensor is" in fault("y[t] = *(const float*)(x[0] > 2 ? 1 : 0);")

    def test_an_access_that_reaches_past_the_end(self, emulate: Emulate) -> None:
        source = kernel("((float4*)y)[t] = make_float4(1, 2, 3, 4);", "float* y")
        with pytest.raises(KernelFault, match=r"at byte 160 of output 0, reaching past its end"):
            emulate(source, [], [TensorInfo((42,), "float32")], block=11)

    def test_misaligned_vectors(self, emulate: Emulate) -> None:
        source = kernel("((float4*)y)[t] = ((const float4*)x)[t];")
        x = np.arange(64, dtype=np.float32)
        (y,) = emulate(source, [x], [FLOATS], block=16)
        np.testing.assert_array_equal(y, x)
        with pytest.raises(KernelFault, match=r"'ld.global.*16 bytes at an address that is 4 off their alignment"):
            emulate(source, [x], [FLOATS], block=16, offset=4)

    def test_inputs_are_not_to_be_written(self, fault: Fault) -> None:
        message = fault("((float*)x)[t] = 1;")
        assert "writes 4 bytes at byte 0 of input 0, which is not to be written" in message


class TestSharedMemory:
    def test_out_of_bounds(self, fault: Fault) -> None:
        message = fault("extern __shared__ float s[]; s[t] = x[t]; __syncthreads(); y[t] = s[63 - t];", shared=128)
        assert "thread (32, 0, 0)" in message
        assert "4 bytes at the shared address 128, out of bounds: the block has 128 bytes" in message

    def test_misaligned(self, fault: Fault) -> None:
        body = "__shared__ __align__(16) char s[512]; *(volatile int*)(s + t * 6) = t; y[t] = 0;"
        assert "4 bytes at the shared address 6, which is 2 off alignment" in fault(body)

    def test_what_nobody_wrote(self, fault: Fault, emulate: Emulate) -> None:
        body = "__shared__ float s[64]; if (t != 9) s[t] = x[t]; __syncthreads(); y[t] = s[t ^ 1];"
        message = fault(body)
        assert "thread (8, 0, 0)" in message
        assert "reads shared address 36, which nobody wrote" in message
        lenient = Checks(uninitialised=False)
        (y,) = emulate(kernel(body), [np.ones(64, np.float32)], [FLOATS], block=64, checks=lenient)
        np.testing.assert_array_equal(np.isnan(y), np.arange(64) == 8)

    @pytest.mark.parametrize(
        ("body", "verb"),
        [
            ("s[t] = x[t]; y[t] = s[63 - t];", "wrote"),
            ("s[t] = x[t]; __syncthreads(); y[t] = s[63 - t]; s[t] = 2;", "read"),
            ("s[t % 32] = x[t]; __syncthreads(); y[t] = s[t % 32];", "wrote"),
            (
                "if (t < 32) s[0] = x[t]; else s[1] = 2; if (t == 40) s[0] = 1; __syncthreads(); y[t] = s[t / 32];",
                "wrote",
            ),
            ("s[t] = x[t]; __syncthreads(); float v = s[0]; if (t == 33) s[0] = 5; y[t] = v;", "read"),
            ("s[t] = x[t]; if (t == 0) atomicAdd(s + 40, 1.f); __syncthreads(); y[t] = s[t];", "wrote"),
        ],
    )
    def test_races_between_warps(self, fault: Fault, body: str, verb: str) -> None:
        message = fault(f"__shared__ volatile float kept[64]; float* s = (float*)kept; {body}")
        assert re.search(
            rf"a race on shared address \d+: (warp \d|other warps) {verb} it with no barrier between", message
        )

    def test_a_missing_barrier_in_a_reduction(self, fault: Fault, emulate: Emulate) -> None:
        body = """__shared__ float s[64]; s[t] = x[t]; {first}
                  for (int step = 32; step > 0; step /= 2) {{ if (t < step) s[t] += s[t + step]; {inner} }}
                  if (t == 0) y[0] = s[0];"""
        whole = body.format(first="__syncthreads();", inner="__syncthreads();")
        (y,) = emulate(kernel(whole), [np.ones(64, np.float32)], [FLOATS], block=64)
        assert y[0] == 64
        assert "a race on shared address" in fault(body.format(first="", inner="__syncthreads();"))

    def test_no_race_within_bytes_of_a_word(self, emulate: Emulate) -> None:
        """Warps that share words, but no byte."""
        body = (
            "__shared__ unsigned char s[64]; s[t % 2 * 32 + t / 2] = t; __syncthreads(); y[t] = s[t % 2 * 32 + t / 2];"
        )
        (y,) = emulate(kernel(body), [np.ones(64, np.float32)], [FLOATS], block=64)
        np.testing.assert_array_equal(y, np.arange(64))

    def test_a_copy_that_is_not_waited_for(self, emulate: Emulate) -> None:
        body = """__shared__ __align__(16) float s[64];
          unsigned to = (unsigned)__cvta_generic_to_shared(s + t % 16 * 4);
          if (t < 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(to), "l"(x + t * 4) : "memory");
          asm volatile("cp.async.commit_group; {wait}" ::: "memory");
          __syncthreads();
          y[t] = s[t];"""
        for wait, poisoned in (("cp.async.wait_group 0;", False), ("cp.async.wait_group 1;", True), ("", True)):
            (y,) = emulate(kernel(body.format(wait=wait)), [np.ones(64, np.float32)], [FLOATS], block=64)
            assert np.isnan(y).all() if poisoned else (y == 1).all()


class TestBarriers:
    def test_in_divergent_code(self, fault: Fault) -> None:
        message = fault("if (t < 40) { y[t] = 1; __syncthreads(); y[t] = 2; } else { y[t] = 3; __syncthreads(); }")
        assert "'bar.sync 0' is a barrier in divergent code" in message

    def test_that_some_never_reach(self, fault: Fault) -> None:
        body = 'if (t < 32) asm volatile("bar.sync 1, 64;"); else asm volatile("bar.sync 2, 64;"); y[t] = 1;'
        message = fault(body)
        assert "'bar.sync 1, 64;' is never left" in message.replace("64'", "64;'")
        assert "others wait at 'bar.sync 2, 64" in message

    def test_lanes_that_exit_do_not_count(self, emulate: Emulate) -> None:
        (y,) = emulate(
            kernel("if (t >= 40) return; __syncthreads(); y[t] = 1;"), [np.ones(64, np.float32)], [FLOATS], block=64
        )
        assert (y[:40] == 1).all()

    def test_a_lane_that_is_not_in_its_mask(self, fault: Fault) -> None:
        assert "its mask of members lacks" in fault("y[t] = __shfl_sync(0xffffu, x[t], 0);")

    def test_matrix_instructions_want_whole_warps(self, fault: Fault) -> None:
        body = """__shared__ __align__(16) float s[64]; unsigned r; s[t] = x[t];
          unsigned at = (unsigned)__cvta_generic_to_shared(s);
          asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r) : "r"(at) : "memory");
          y[t] = r;"""
        assert "needs all lanes of the warp" in fault(body, block=20)

    def test_matrix_instructions_in_divergent_code(self, fault: Fault) -> None:
        body = """unsigned r = t; if (t % 32 < 7)
          asm volatile("mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {%0,%0}, {%0,%0}, {%0}, {%0,%0};" : "+r"(r));
          else __syncwarp(0xffffff80u);
          for (;;) __syncwarp(); y[t] = r;"""
        assert "is never left" in fault(body)


class TestTheKernelBefore:
    """In a launch that may overlap with it, each thread waits before it reads or writes tensors, and before it ends."""

    WAIT = 'asm volatile("griddepcontrol.wait;" ::: "memory");'
    EARLY = 'float early = x[t]; asm volatile("" :: "f"(early));'
    COPY = (
        "__shared__ float s[64]; unsigned to = __cvta_generic_to_shared(s + t);"
        'asm volatile("cp.async.ca.shared.global [%0], [%1], 4; cp.async.wait_all;" :: "r"(to), "l"(x + t));'
    )

    @pytest.mark.parametrize(
        ("body", "deed", "thread"),
        [
            (f"{EARLY} WAIT y[t] = early;", "reads", 0),
            (f"{COPY} WAIT y[t] = s[t];", "reads", 0),
            ("y[t] = 1; WAIT y[t] = x[t];", "writes", 0),
            ("atomicAdd(y + t, 1.0f); WAIT y[t] = x[t];", "writes", 0),
            ("y[t] = x[t];", "reads", 0),
            ("if (t != 40) WAIT y[t] = x[t];", "reads", 40),
            ("if (t == 41) return; WAIT y[t] = x[t];", "ends", 41),
            (
                'asm("{.reg .pred p; setp.eq.u32 p, %0, 42; @p exit;}" :: "r"(t)); WAIT y[t] = x[t];',
                "ends",
                42,
            ),
            ("", "ends", 0),
            ("#if __CUDA_ARCH__ >= 1000\n WAIT\n#endif\n y[t] = x[t];", "reads", 0),
        ],
    )
    def test_threads_that_do_not_wait(self, fault: Fault, body: str, deed: str, thread: int) -> None:
        message = fault("\n" + body.replace("WAIT", self.WAIT), overlap=True)
        assert f"thread ({thread}, 0, 0)" in message
        assert f"{deed} before the thread ran griddepcontrol.wait, as one whose launch may overlap has to" in message

    @pytest.mark.parametrize(
        "body", ["", "if (blockIdx.x > 0)", "if (t % 2)", "for (int i = 0; i < 3; ++i)", "if (t < 7) WAIT else"]
    )
    def test_threads_that_wait(self, emulate: Emulate, body: str) -> None:
        """Once, or in several ways; other kernels' launches do not overlap, and code for older GPUs cannot wait."""
        x = np.arange(64, dtype=np.float32)
        ways = f"{body} WAIT".replace("WAIT", self.WAIT)
        source = kernel(f"{ways} {self.WAIT} if (blockIdx.x == 2) y[t] = x[t];")
        (y,) = emulate(source, [x], [FLOATS], block=64, grid=3, overlap=True)
        np.testing.assert_array_equal(y, x)
        (y,) = emulate(kernel("y[t] = x[t];"), [x], [FLOATS], block=64)
        np.testing.assert_array_equal(y, x)
        launch = KernelLaunch("k", (), (1, 1, 1), (64, 1, 1), overlap=True)
        (y,) = emulator.run_on_arrays(nvrtc.compile_ptx(kernel("y[t] = x[t];")).text, launch, [x], [FLOATS])
        np.testing.assert_array_equal(y, x)

    def test_variables_are_read_before_the_wait_or_written_after_it(self, emulate: Emulate) -> None:
        x = np.arange(64, dtype=np.float32)
        variables = "__constant__ float by[2] = {1, 2}; __device__ float more = 3; __device__ int count = 0;"

        def run(body: str) -> Array:
            source = variables + kernel(body.replace("WAIT", self.WAIT))
            return emulate(source, [x], [FLOATS], block=64, overlap=True)[0]

        expected = x * np.where(np.arange(64) % 2, 5, 4)
        np.testing.assert_array_equal(run("float f = by[t % 2] + more; WAIT y[t] = x[t] * f;"), expected)
        np.testing.assert_array_equal(run("WAIT y[t] = x[t] * (by[t % 2] + more); count = t;"), expected)
        mixed = "float early = *(t % 2 ? &more : x); WAIT y[t] = x[t] * early;"
        with pytest.raises(KernelFault, match=r"thread \(0, 0, 0\): 'ld[^']*' reads before the thread ran"):
            run(mixed)
        run(f"if (t % 2 == 0) {{ WAIT }} {mixed}")
        with pytest.raises(KernelFault, match="writes before the thread ran"):
            run("atomicAdd(&count, 1); WAIT y[t] = x[t];")
        with pytest.raises(KernelFault, match="writes a variable that was read before"):
            run("int n = count; WAIT y[t] = x[t] + n; if (t == 9) count = n + 1;")


class TestLimits:
    def test_an_endless_loop(self, fault: Fault) -> None:
        message = fault("while (((volatile const float*)x)[0] < 2); y[t] = 1;", checks=Checks(max_steps=10_000))
        assert "is reached after 10000 steps: the kernel seems to run for ever" in message

    def test_a_trap_and_a_call(self, fault: Fault, emulate: Emulate) -> None:
        assert "'trap' stops the kernel" in fault("if (t == 7) __trap(); y[t] = 1;")
        assert "thread (7, 0, 0)" in fault("if (t == 7) __trap(); y[t] = 1;")
        with pytest.raises(Unsupported, match=r"thread \(9, 0, 0\): 'call.*calls a function that was not inlined"):
            emulate(kernel('if (t == 9) printf("%d", t); y[t] = 1;'), [np.ones(64, np.float32)], [FLOATS], block=64)

    def test_a_call_that_is_not_reached(self, emulate: Emulate) -> None:
        body = 'if (x[t] > 1) printf("%d", t); y[t] = 5;'
        (y,) = emulate(kernel(body), [np.ones(64, np.float32)], [FLOATS], block=64)
        assert (y == 5).all()

    @pytest.mark.parametrize(
        ("assembly", "named"),
        [
            ("griddepcontrol.wait;", "griddepcontrol.wait"),  # which sm_80 lacks
            ("wgmma.fence.sync.aligned;", "wgmma.fence.sync.aligned"),
            ("add.rn.wonderful.f32 %0, %0, %0;", ""),
            ("bar.arrive 1, 64;", "bar.arrive 1, 64"),
            ("tex.1d.v4.f32.f32 {%0, _, _, _}, [t, {%0}];", ""),
        ],
    )
    def test_unknown_instructions(self, emulate: Emulate, assembly: str, named: str) -> None:
        text = (
            ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 p)\n{\n.reg .f32 %f<2>;\n"
            f"{assembly.replace('%0', '%f1')}\nret;\n}}\n"
        )
        del emulate
        launch = KernelLaunch("k", (), (1, 1, 1), (32, 1, 1))
        words = re.escape(named or assembly.replace("%0", "%f1").rstrip(";"))
        with pytest.raises(Unsupported, match=f"the emulator does not know .*'{words}'"):
            emulator.run_on_arrays(text, launch, [], [FLOATS])

    def test_launches_that_do_not_fit(self, emulate: Emulate) -> None:
        source = kernel("y[t] = x[t];")
        with pytest.raises(KernelFault, match=r"parameters of \[8, 8\] bytes, but a launch gives \[8, 4, 8\]"):
            emulate(source, [np.ones(64, np.float32)], [FLOATS], extras=(1,))
        with pytest.raises(KernelFault, match="2048 threads a block"):
            emulate(source, [np.ones(64, np.float32)], [FLOATS], block=2048)
        emulate(source, [np.ones(64, np.float32)], [FLOATS], block=64, shared=48 * 1024)
        own = kernel("__shared__ float s[64]; s[t] = x[t]; y[t] = s[t];")
        for text, shared in ((source, 49153), (own, 49152 - 255)):
            with pytest.raises(KernelFault, match="with 49153 bytes of shared memory a block, but 49152 are the most"):
                emulate(text, [np.ones(64, np.float32)], [FLOATS], block=64, shared=shared)
        text = ".version 8.0\n.target sm_80\n"
        with pytest.raises(Unsupported, match="has no kernel k"):
            emulator.run_on_arrays(text, KernelLaunch("k", (), (1, 1, 1), (32, 1, 1)), [], [])
