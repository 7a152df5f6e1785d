// cuda/primitives.cuh against what it promises: compiled by nvcc on a GPU, or as C++ with the
// host's twins, which so are held to the same values as the device.
//
// Prints what is wrong and "N of M checks failed"; ends with 1 where one failed.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

#include "cuda/primitives.cuh"

namespace effnet {
namespace cuda {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

int failures = 0, checks = 0;

void expect(const char* what, bool condition, const std::string& detail = "") {
  checks++;
  if (condition) return;
  failures++;
  std::printf("%s: wrong%s%s\n", what, detail.empty() ? "" : ": ", detail.c_str());
}

#ifdef EFFNET_SIMT
void* allocate(size_t bytes) { return std::malloc(bytes); }
void release(void* p) { std::free(p); }
void finish() {}
#else
void* allocate(size_t bytes) {
  void* p = nullptr;
  check("cudaMallocManaged", cudaMallocManaged(&p, bytes));
  return p;
}
void release(void* p) { cudaFree(p); }
void finish() { check("a kernel", cudaDeviceSynchronize()); }
#endif

// Memory that host and kernels see.
template <typename T>
struct Array {
  T* data;
  int64_t size;
  explicit Array(int64_t size)
      : data(static_cast<T*>(allocate(static_cast<size_t>(size) * sizeof(T)))), size(size) {}
  explicit Array(const std::vector<T>& from) : Array(static_cast<int64_t>(from.size())) {
    for (int64_t i = 0; i < size; i++) data[i] = from[i];
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { release(data); }
};

__global__ void index_kernel(int64_t* out) {
  const int64_t block = (block_z() * 3 + block_y()) * 2 + block_x();
  out[block * block_dim_x() + thread_x()] = block * 1000 + thread_x();
}

void test_indices() {
  Array<int64_t> out(2 * 3 * 4 * 60);
  launch("index", index_kernel, {2, 3, 4, 60, 0, nullptr}, out.data);
  finish();
  bool all = true;
  for (int64_t i = 0; i < out.size; i++) all &= out.data[i] == i / 60 * 1000 + i % 60;
  expect("indices of threads and blocks", all);
}

__global__ void shuffle_kernel(float* out) {
  const int lane = thread_x() % kWarp;
  const float v = static_cast<float>(thread_x());
  float* row = out + thread_x();
  row[0] = shuffle_xor(v, 5);
  row[64] = static_cast<float>(shuffle_xor(int64_t{1} << lane, 1) == int64_t{1} << (lane ^ 1));
  row[128] = lane < 16 ? shuffle_xor(v, 4, 0xffffu) : shuffle_xor(v, 8, 0xffff0000u);
}

void test_shuffles() {
  Array<float> out(64 * 3);
  launch("shuffle", shuffle_kernel, grid_of(1, 1, 1, 64, 0, nullptr), out.data);
  finish();
  const char* const names[] = {"shuffle_xor", "64-bit shuffle", "shuffles of half warps"};
  for (int which = 0; which < 3; which++) {
    bool all = true;
    for (int i = 0; i < 64; i++) {
      const int lane = i % kWarp, warp = i - lane;
      const int from[] = {lane ^ 5, 1 - warp, lane < 16 ? lane ^ 4 : lane ^ 8};
      all &= out.data[which * 64 + i] == static_cast<float>(warp + from[which]);
    }
    expect(names[which], all);
  }
}

// Words of x through shared memory: one group of 16 bytes, one of 8 and 4, every third one zeros.
__global__ void copy_kernel(const uint32_t* x, uint32_t* y) {
  uint32_t* const first = dynamic_shared<uint32_t>();  // [32][4], then [32][2], then [32]
  uint32_t *const second = first + 128, *const third = second + 64;
  const int i = thread_x();
  const bool valid = i % 3 != 0;
  cp_async<16>(first + 4 * i, x + 4 * i, valid);
  cp_async_commit();
  cp_async<8>(second + 2 * i, x + 2 * i, valid);
  cp_async<4>(third + i, x + i, valid);
  cp_async_commit();
  cp_async_wait<1>();
  store(reinterpret_cast<uint4*>(y) + i, load_shared(reinterpret_cast<uint4*>(first) + i));
  cp_async_wait<0>();
  sync_threads();
  const int other = 31 - i;
  y[128 + 2 * other] = second[2 * other];
  y[128 + 2 * other + 1] = second[2 * other + 1];
  y[192 + other] = third[other];
}

void test_copies() {
  Array<uint32_t> x(128), y(224);
  for (int i = 0; i < 128; i++) x.data[i] = 1000u + static_cast<uint32_t>(i);
  launch("copy", copy_kernel, grid_of(1, 1, 1, 32, 224 * 4, nullptr), x.data, y.data);
  finish();
  bool all = true;
  for (int i = 0; i < 224; i++) {
    const int at = i < 128 ? i : i < 192 ? i - 128 : i - 192;
    const int thread = i < 128 ? i / 4 : i < 192 ? at / 2 : at;
    all &= y.data[i] == (thread % 3 ? x.data[at] : 0u);
  }
  expect("cp_async", all);
}

template <typename T>
__global__ void convert_kernel(const float* x, T* y, float* back, uint32_t* packed, int64_t n) {
  for (int64_t i = 2 * thread_x(); i < n; i += 2 * block_dim_x()) {
    y[i] = from_float<T>(x[i]);
    y[i + 1] = from_float<T>(x[i + 1]);
    back[i] = to_float(y[i]);
    back[i + 1] = to_float(y[i + 1]);
    packed[i / 2] = pack2<T>(make_float2(x[i], x[i + 1]));
  }
}

struct Conversion {
  float value;
  uint16_t half, bfloat16;
};

// Ties to even, overflow, subnormals, infinities.
const Conversion kConversions[] = {
    {1.0f, 0x3c00, 0x3f80},           {-2.5f, 0xc100, 0xc020},
    {1.00390625f, 0x3c04, 0x3f80},    {1.01171875f, 0x3c0c, 0x3f82},
    {1.00048828125f, 0x3c00, 0x3f80}, {1.00146484375f, 0x3c02, 0x3f80},
    {65519.0f, 0x7bff, 0x4780},       {65520.0f, 0x7c00, 0x4780},
    {3.4e38f, 0x7c00, 0x7f80},        {5.9604645e-8f, 0x0001, 0x3380},
    {-kInf, 0xfc00, 0xff80},          {-0.0f, 0x8000, 0x8000},
};

template <typename T>
void test_conversions(const char* what, uint16_t Conversion::* bits) {
  std::vector<float> values;
  for (const Conversion& c : kConversions) values.push_back(c.value);
  const Array<float> x(values);
  const int64_t n = x.size;
  Array<T> y(n);
  Array<float> back(n);
  Array<uint32_t> packed(n / 2);
  launch(what, convert_kernel<T>, grid_of(1, 1, 1, 32, 0, nullptr), x.data, y.data, back.data,
         packed.data, n);
  finish();
  for (int64_t i = 0; i < n; i++) {
    const uint32_t right = kConversions[i].*bits;
    expect(what, bits_as<uint16_t>(y.data[i]) == right, std::to_string(x.data[i]));
    expect(what, (packed.data[i / 2] >> (i % 2 * 16) & 0xffffu) == right, "packed");
    const float2 pair = unpack2<T>(packed.data[i / 2]);
    expect(what, bits_as<uint32_t>(i % 2 ? pair.y : pair.x) == bits_as<uint32_t>(back.data[i]),
           "unpacked");
  }
}

template <typename T, typename V>
__global__ void vector_kernel(const V* x, V* y) {
  float v[kElements<T, V>];
  unpack<T>(load(x + thread_x()), v);
  for (float& element : v) element *= 2.0f;
  store(y + thread_x(), pack<T, V>(v));
}

template <typename T, typename V>
void test_vectors(const char* what) {
  const int64_t n = 32 * kElements<T, V>;
  Array<T> x(n), y(n);
  for (int64_t i = 0; i < n; i++) x.data[i] = from_float<T>(static_cast<float>(i));
  launch(what, vector_kernel<T, V>, grid_of(1, 1, 1, 32, 0, nullptr),
         reinterpret_cast<const V*>(x.data), reinterpret_cast<V*>(y.data));
  finish();
  bool all = true;
  for (int64_t i = 0; i < n; i++) all &= to_float(y.data[i]) == 2.0f * to_float(x.data[i]);
  expect(what, all);
}

__global__ void maths_kernel(const float* x, float* y, int64_t n) {
  for (int64_t i = thread_x(); i < n; i += block_dim_x()) {
    const float v = x[i];
    const float all[] = {exp2_approx(v), rcp_approx(v), sigmoid(v), silu(v), silu_grad(v)};
    for (int k = 0; k < 5; k++) y[5 * i + k] = all[k];
  }
}

void test_maths() {
  const char* const names[] = {"exp2_approx", "rcp_approx", "sigmoid", "silu", "silu_grad"};
  // Relative errors; of silu_grad, which has a zero, absolute.
  const double bounds[] = {2.5e-7, 1.5e-7, 6e-6, 6e-6, 3e-6};
  std::vector<float> values;
  for (int i = 1; i <= 400; i++) values.insert(values.end(), {0.05f * i, -0.05f * i});
  const size_t finite = values.size();
  values.insert(values.end(), {-200.0f, 200.0f, kInf, -kInf, kNaN, 0.0f});
  const Array<float> x(values);
  Array<float> y(5 * x.size);
  launch("maths", maths_kernel, grid_of(1, 1, 1, 64, 0, nullptr), x.data, y.data, x.size);
  finish();
  for (int k = 0; k < 5; k++) {
    double worst = 0;
    for (size_t i = 0; i < finite; i++) {
      const double v = x.data[i], s = 1 / (1 + std::exp(-v));
      const double right[] = {std::exp2(v), 1 / v, s, v * s, s * (1 + v * (1 - s))};
      const double error = std::fabs(y.data[5 * i + k] - right[k]);
      worst = std::fmax(worst, k == 4 ? error : error / std::fabs(right[k]));
    }
    expect(names[k], worst <= bounds[k], std::to_string(worst));
  }
  const auto silu_of = [&](size_t i) { return y.data[5 * (finite + i) + 3]; };
  expect("silu(-200)", silu_of(0) == 0.0f);
  expect("silu(200)", silu_of(1) == 200.0f);
  expect("silu(inf)", silu_of(2) == kInf);
  expect("silu(-inf)", std::isnan(silu_of(3)));
  expect("silu(nan)", std::isnan(silu_of(4)));
  expect("silu(0)", silu_of(5) == 0.0f);
}

// Every exponent and sign, 512 mantissas each: relative errors where exp(-v) is finite and sigmoid
// no subnormal, which the device makes 0; below it any value from the exact one to 0.
void test_silu_over_all_exponents() {
  constexpr float kLeast = -87.0f;
  constexpr double kBound = 6e-6, kSmallest = 0x1p-126;
  std::vector<float> values;
  for (uint32_t high = 0; high < 512; high++) {
    if ((high & 255) == 255) continue;  // infinities and NaN
    for (uint32_t i = 0; i < 512; i++)
      values.push_back(bits_as<float>(high << 23 | i << 14 | (i * 2654435761u >> 18)));
  }
  const Array<float> x(values);
  Array<float> y(5 * x.size);
  launch("maths", maths_kernel, grid_of(1, 1, 1, 256, 0, nullptr), x.data, y.data, x.size);
  finish();
  const char* const names[] = {"sigmoid", "silu", "silu_grad"};
  for (int k = 0; k < 3; k++) {
    double worst = 0;
    for (int64_t i = 0; i < x.size; i++) {
      const double v = x.data[i], s = 1 / (1 + std::exp(-v)), rest = 1 / (1 + std::exp(v));
      const double right[] = {s, v * s, s * (1 + v * rest)};
      const double size = k == 2 ? std::fmax(s * (1 + std::fabs(v) * rest), s) : right[k];
      const double actual = y.data[5 * i + 2 + k], allowed = std::fabs(size) + kSmallest;
      const double error = std::fabs(actual - right[k]) / allowed;
      const bool fades = v < kLeast && std::fabs(actual) <= std::fabs(right[k]) * (1 + kBound);
      if (!fades && !(error <= worst)) worst = error;
    }
    expect(names[k], worst <= kBound, "over all exponents " + std::to_string(worst));
  }
}

void test_shapes() {
  const LaunchShape wrong[] = {
      grid_of(int64_t{1} << 31, 1, 1, 32, 0, nullptr), grid_of(1, 65536, 1, 32, 0, nullptr),
      grid_of(1, 1, 1, 1025, 0, nullptr), grid_of(1, 1, 1, 32, kMaxSharedBytes + 1, nullptr),
      grid_of(-1, 1, 1, 32, 0, nullptr)};
  for (const LaunchShape& shape : wrong) {
    bool refused = false;
    try {
      launch("index", index_kernel, shape, static_cast<int64_t*>(nullptr));
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    expect("a launch that no device takes", refused);
  }
  launch("index", index_kernel, grid_of(0, 1, 1, 32, 0, nullptr), static_cast<int64_t*>(nullptr));
}

}  // namespace
}  // namespace cuda
}  // namespace effnet

int main() {
  using namespace effnet::cuda;
  test_indices();
  test_shuffles();
  test_copies();
  test_conversions<__half>("fp16", &Conversion::half);
  test_conversions<__nv_bfloat16>("bf16", &Conversion::bfloat16);
  test_vectors<float, uint4>("vectors of 4 fp32");
  test_vectors<float, uint2>("vectors of 2 fp32");
  test_vectors<__half, uint4>("vectors of 8 fp16");
  test_vectors<__nv_bfloat16, uint2>("vectors of 4 bf16");
  test_vectors<__nv_bfloat16, uint32_t>("vectors of 2 bf16");
  test_maths();
  test_silu_over_all_exponents();
  test_shapes();
  std::printf("%d of %d checks failed\n", failures, checks);
  return failures != 0;
}
