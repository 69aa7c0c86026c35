// SPDX-License-Identifier: MIT
// Producers of backward.cuh: from activations to what consumers read, and from what they leave to gradients.
#pragma once

#include <zamba/kernel/vector_load.cuh>
#include <zamba/ops/selective_scan/backward_stages.cuh>

namespace zamba::kernel {

/// A place that moves with the token, by one multiplication of 32 bits.
template <class T>
struct TokenPlace {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  Byte* first = nullptr;
  int step = 0;
  TokenPlace() = default;
  __device__ TokenPlace(T* first, Index stride)
      : first(reinterpret_cast<Byte*>(first)), step(static_cast<int>(stride * Index{sizeof(T)})) {}
  __device__ T* operator()(int token) const {
    Index offset;
    asm("mul.wide.s32 %0, %1, %2;" : "=l"(offset) : "r"(token), "r"(step));
    return reinterpret_cast<T*>(first + offset);
  }
};

/// A producer. Of every stage, thread i takes token i / 8, and of it channels 4 (i % 8) .. and four elements of B or C.
template <class Traits>
struct ScanBackwardProducer {
  using A = typename Traits::A;
  using Quad = AlignedVector<A, 4>;
  using Shared = ScanBackwardShared<Traits>;
  using Inputs = SelectiveScanInputs<A, float>;
  using Gradients = SelectiveScanGradients<A, float>;
  static constexpr bool wide = Traits::wide;
  static constexpr int slices = Traits::slices, tokens = Traits::tokens;

  Shared& shared;
  int token, quad, width;  // width: channels of the quad that there are
  bool of_BC, of_C;        // whether it has elements of B or C, and which
  int BC_slice, BC_width;  // states that there are
  float bias[4], skip[4];  // of the channels
  float d_bias[4] = {}, d_skip[4] = {};
  // Of the row's tokens, `token` further on.
  TokenPlace<const A> u, delta, z, d_y, BC;
  TokenPlace<A> d_u, d_delta, d_z;
  TokenPlace<float> part;

  __device__ ScanBackwardProducer(Shared& shared, int thread, const Inputs& in, const ScanTile& tile) : shared(shared) {
    token = thread / Traits::quads;
    quad = thread % Traits::quads;
    width = ::max(::min(tile.width - 4 * quad, 4), 0);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bias[i] = i < width ? in.delta_bias[tile.channel + 4 * quad + i] : 0.0f;
      skip[i] = i < width ? in.D[tile.channel + 4 * quad + i] : 0.0f;
    }
    of_BC = Traits::quads == 2 * slices || quad < 2 * slices;
    of_C = quad / slices == 1;
    BC_slice = quad % slices;
    BC_width = of_BC ? ::max(::min(static_cast<int>(in.B.shape[2]) - 4 * BC_slice, 4), 0) : 0;
  }

  /// A row whose first token is `begin`; part_BC: of the tile.
  __device__ void begin_row(const Inputs& in, const Matrix<const A>& dy, const Gradients& out,
                            const Matrix<float>& part_BC, const ScanTile& tile, Index begin) {
    const Index channel = tile.channel + 4 * quad, first = begin + token;
    const auto of = [&](const auto& matrix) { return TokenPlace(&matrix(first, channel), matrix.stride[0]); };
    u = of(in.u), delta = of(in.delta), z = of(in.z), d_y = of(dy);
    d_u = of(out.u), d_delta = of(out.delta), d_z = of(out.z);
    const Tensor<const A, 3>& source = of_C ? in.C : in.B;
    BC = TokenPlace(&source(first, tile.head, 4 * BC_slice), source.stride[0]);
    part = TokenPlace(&part_BC(first, of_C * in.B.shape[2] + 4 * BC_slice), part_BC.stride[0]);
  }

  /// Elements of a stage; its first token is `first` of the row, which has `left` tokens from there on, here and below.
  struct StepInputs {
    Quad u, delta, B;
  };
  __device__ StepInputs load_steps(int first, int left) const {
    const int there = token < left ? width : 0;
    return {load_vector_masked<4, wide>(u(first), there), load_vector_masked<4, wide>(delta(first), there),
            load_vector_masked<4, wide>(BC(first), token < left && !of_C ? BC_width : 0)};
  }
  struct OutputInputs {
    Quad z, d_y, C;
  };
  __device__ OutputInputs load_outputs(int first, int left) const {
    const int there = token < left ? width : 0;
    return {load_vector_masked<4, wide>(z(first), there), load_vector_masked<4, wide>(d_y(first), there),
            load_vector_masked<4, wide>(BC(first), token < left && of_C ? BC_width : 0)};
  }

  /// Writes what states of a stage are computed from.
  __device__ void prepare_steps(int slot, int left, const StepInputs& loaded) const {
    constexpr float none = -1e30f;  // past the end dt is 0 with it, and the state stays as it is
    float dt[4], dt_u[4], slopes[4], B[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      dt[i] = scan_softplus(token < left ? loaded.delta[i] + bias[i] : none, slopes[i]);
      dt_u[i] = dt[i] * loaded.u[i];
    }
    auto& to = shared.tokens[slot][token];
    to.steps[Shared::step_place(2 * quad)] = make_float4(dt[0], dt[1], dt_u[0], dt_u[1]);
    to.steps[Shared::step_place(2 * quad + 1)] = make_float4(dt[2], dt[3], dt_u[2], dt_u[3]);
    store_vector(&to.slopes[4 * quad], slopes);
    to.u[quad] = loaded.u;
    loaded.B.unpack(B);
    if (of_BC && !of_C) store_vector(&to.steps[Shared::B_place(BC_slice)].x, B);
  }

  /// Writes what adjoint states of a stage are computed from.
  __device__ void prepare_outputs(int buffer, const OutputInputs& loaded) const {
    float d_y[4], d_z[4], C[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float z = loaded.z[i], gate = scan_sigmoid(z), d_gated = loaded.d_y[i] * gate;
      d_y[i] = d_gated * z;
      d_z[i] = d_gated * ::fmaf(z, 1.0f - gate, 1.0f);
    }
    auto& to = shared.outputs[buffer][token];
    store_vector(&to.d_y[4 * quad], d_y);
    store_vector(&to.d_z[4 * quad], d_z);
    loaded.C.unpack(C);
    if (of_C) store_vector(&to.C[BC_slice].x, C);
  }

  /// Writes the gradients of a stage.
  __device__ void finish(int first, int slot, int left, int buffer) {
    const auto& step = shared.tokens[slot][token];
    const auto& output = shared.outputs[buffer][token];
    const int there = token < left ? width : 0;
    float d_y[4], d_z[4], slopes[4], y[4], g_B[4], d_dt[4], of_u[4], of_delta[4], of_z[4];
    const auto sum_of = [&](typename Shared::Sum which, float(&to)[4]) {
      float sums[slices][4];
#pragma unroll
      for (int k = 0; k < slices; ++k)
        load_vector<4>(&output.sums[which][Shared::sum_place(4 * quad, k)]).unpack(sums[k]);
#pragma unroll
      for (int i = 0; i < 4; ++i) to[i] = (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]);
    };
    sum_of(Shared::C_s, y);
    sum_of(Shared::g_B, g_B);
    sum_of(Shared::d_dt, d_dt);
    load_vector<4>(&output.d_y[4 * quad]).unpack(d_y);
    load_vector<4>(&output.d_z[4 * quad]).unpack(d_z);
    load_vector<4>(&step.slopes[4 * quad]).unpack(slopes);
    const float4 &even = step.steps[Shared::step_place(2 * quad)], &odd = step.steps[Shared::step_place(2 * quad + 1)];
    const float dt[4] = {even.x, even.y, odd.x, odd.y};
    const Quad u = step.u[quad];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      constexpr float ln_2 = 0.693147181f;
      of_u[i] = ::fmaf(g_B[i], dt[i], d_y[i] * skip[i]);
      of_delta[i] = ::fmaf(d_dt[i], ln_2, g_B[i] * u[i]) * slopes[i];
      of_z[i] = d_z[i] * ::fmaf(skip[i], u[i], y[i]);
      d_skip[i] = ::fmaf(d_y[i], u[i], d_skip[i]);
      d_bias[i] += of_delta[i];
    }
    store_vector_masked<wide>(d_u(first), of_u, there);
    store_vector_masked<wide>(d_delta(first), of_delta, there);
    store_vector_masked<wide>(this->d_z(first), of_z, there);
    finish_parts(first, left, buffer);
  }

  /// The block's part of dB and dC.
  __device__ void finish_parts(int first, int left, int buffer) const {
    if (!of_BC) return;
    float sum[4];
#pragma unroll
    for (int k = 0; k < Traits::parts; ++k) {
      float one[4];
      load_vector<4>(&shared.outputs[buffer][token].parts[k][Shared::part_place(quad, k)].x).unpack(one);
#pragma unroll
      for (int i = 0; i < 4; ++i) sum[i] = k > 0 ? sum[i] + one[i] : one[i];
    }
    store_vector_masked<wide>(part(first), sum, token < left ? BC_width : 0);
  }

  /// The way through a row, as the consumers': steps are prepared a chunk ahead, outputs a stage.
  __device__ void through_row(const ScanChunks<Traits>& chunks, int& buffer) {
    const int length = chunks.length, last = chunks.count - 1;
    int ahead = last * Traits::chunk, end = length;  // of the next steps the first token, and where their chunk ends
    StepInputs steps = load_steps(ahead, length - ahead);
    const auto steps_next = [&](int slot) {
      if (ahead < 0) return;
      prepare_steps(slot, length - ahead, steps);
      ahead += tokens;
      if (ahead >= end) {
        end = (end - 1) / Traits::chunk * Traits::chunk;
        ahead = end - Traits::chunk;
      }
      steps = load_steps(ahead, ahead < 0 ? 0 : length - ahead);
    };
    int before = (length - 1) / tokens * tokens, behind = before;  // first tokens of the next outputs, to be finished
    int next_buffer = buffer;
    OutputInputs outputs = load_outputs(before, length - before);
    const auto outputs_next = [&] {
      prepare_outputs(next_buffer, outputs);
      next_buffer ^= 1;
      before -= tokens;
      outputs = load_outputs(before, before < 0 ? 0 : length - before);
    };
    for (int slot = 0; slot < Traits::slots; ++slot) steps_next(slot);
    outputs_next();
    __syncthreads();  // the first stages are prepared
    ScanSlots<Traits> slots(chunks.stages(last));
    int stage = chunks.stages(last) - 1, slot = 0;  // slot: of the stage that can be finished
    const auto step = [&] {
      outputs_next();
      slot = slots.now(stage);
      slots.pass_on(stage);
      if (--stage < 0) {
        slots.next_chunk();
        stage = Traits::stages - 1;
      }
      __syncthreads();  // the stage can be finished
    };
    const auto finish_next = [&] {
      finish(behind, slot, length - behind, buffer);
      behind -= tokens;
      buffer ^= 1;
      steps_next(slot);
    };
    step();
    while (behind > 0) {
      finish_next();
      step();
    }
    finish_next();
  }
};

}  // namespace zamba::kernel
