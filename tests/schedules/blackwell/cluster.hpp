// A cluster of two blocks on a CPU, for CUDA text that TileLang lowered: its threads are fibres that a seeded scheduler
// runs in any order; copies land, and the matrix unit works through its queue, at any later time.
//
// Modelled by PTX's manual: mbarriers (phases, arrivals, bytes), tensor maps of rank 2 with swizzle by 128 bytes and
// their clipping, shared-memory descriptors (K-major, 128-byte swizzle, or none for scales), tcgen05.cp 32x128b.warpx4,
// tcgen05.mma kind::mxf8f6f4.block_scale of a pair (M 256), its instruction descriptor, tcgen05.commit to both blocks,
// tcgen05.ld 32x32b. Not modelled: fences and the memory model, addresses' limits, speed.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#define __global__
#define __launch_bounds__(...)
#define __grid_constant__
#define threadIdx (emu::self->thread)
#define blockIdx (emu::self->block)

using uchar = unsigned char;
using uint = unsigned int;
struct fp8_e4_t { uint8_t bits; };
struct bfloat16_t { uint16_t bits; };
struct uint2 { uint x, y; };
struct alignas(16) uint4 { uint x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct __nv_bfloat162 { uint16_t x, y; };

struct CUtensorMap {  // rank 2; sizes and box in elements, outer first
  char* base;
  long sizes[2], stride;
  int box[2], width, swizzle;
};

namespace emu {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated cluster: %s\n", what);
  std::abort();
}
inline void require(bool right, const char* what) {
  if (!right) fail(what);
}

constexpr int THREADS = 256, BLOCKS = 2, SHARED = 232448, LANES = 128, COLUMNS = 512;

struct Index { int x; };
struct Block {
  std::unique_ptr<char[]> raw{new char[SHARED + 1024]};
  char* shared = nullptr;
  std::map<std::string, size_t> names;
  size_t used = 0;  // by named variables, from the end of the tiles on
  uint32_t tensor[LANES][COLUMNS];
  uint columns = 0;
  struct Named { int count = 0; long turn = 0; } named[16], warps[THREADS / 32];
};
struct Fibre {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(65536);
  Index thread{}, block{};
  int rank = 0;
  bool over = false;
  std::function<bool()> ready;
};

inline Fibre* self = nullptr;
inline ucontext_t scheduler;
inline Block* blocks = nullptr;  // two
inline size_t dynamic_bytes = 0;
inline std::vector<std::function<void()>> landing;  // in any order
inline std::deque<std::function<void()>> unit;      // of the pair, in order
inline Block::Named both;

inline Block& mine() { return blocks[self->rank]; }
inline void block_until(std::function<bool()> ready) {
  if (ready()) return;
  self->ready = std::move(ready);
  swapcontext(&self->context, &scheduler);
}
inline void meet(Block::Named& named, int count) {
  const long turn = named.turn;
  if (++named.count == count) named.count = 0, ++named.turn;
  block_until([&named, turn] { return named.turn != turn; });
}
inline uchar* dynamic() { return reinterpret_cast<uchar*>(mine().shared); }
template <class T>
T* variable(const char* name, int count) {
  auto& block = mine();
  auto [at, fresh] = block.names.try_emplace(name, dynamic_bytes + block.used);
  if (fresh) block.used += (sizeof(T) * count + 15) / 16 * 16;
  require(dynamic_bytes + block.used <= SHARED, "too much shared memory");
  return reinterpret_cast<T*>(block.shared + at->second);
}
inline size_t offset(const void* pointer) {  // in this block's shared memory
  const auto at = static_cast<const char*>(pointer) - mine().shared;
  require(at >= 0 && at < SHARED, "an address outside shared memory");
  return size_t(at);
}
inline size_t swizzled(size_t address) { return address ^ (((address >> 7) & 7) << 4); }

inline float e4m3(uint8_t bits) {
  const int exponent = bits >> 3 & 15, fraction = bits & 7;
  if (exponent == 15 && fraction == 7) return NAN;
  const float size = exponent ? std::ldexp(1 + fraction / 8.0f, exponent - 7) : std::ldexp(fraction / 8.0f, -6);
  return bits & 128 ? -size : size;
}
inline double e8m0(uint8_t bits) { return bits == 255 ? NAN : std::ldexp(1.0, int(bits) - 127); }

}  // namespace emu

struct Barrier {
  int16_t pending, count;
  int32_t state;  // bytes to come, times two, plus the phase's parity
  void init(int arrivals) { pending = count = int16_t(arrivals), state = 0; }
  void settle() {
    emu::require(pending >= 0, "more arrivals than a barrier counts");
    if (pending == 0 && state >> 1 == 0) pending = count, state ^= 1;
  }
  void arrive_here() { --pending, settle(); }
  void arrive() { arrive_here(); }
  void arrive(uint rank) { reinterpret_cast<Barrier*>(emu::blocks[rank].shared + emu::offset(this))->arrive_here(); }
  void expect_transaction(int bytes) { state += 2 * bytes; }
  void landed(int bytes) { state -= 2 * bytes, settle(); }
  void wait(int parity) {
    emu::block_until([this, parity] { return (state & 1) != parity; });
  }
};

namespace tl {

enum class DataType { kFloat8_e4m3 };

inline void fence_barrier_init() {}
inline void fence_proxy_async() {}
inline void tcgen05_before_thread_sync() {}
inline void tcgen05_after_thread_sync() {}
inline void prefetch_tma_descriptor(const CUtensorMap&) {}
inline int block_rank_in_cluster() { return emu::self->rank; }
inline void cluster_sync() { emu::meet(emu::both, emu::THREADS * emu::BLOCKS); }
inline void __sync_thread_partial(int id, int count) { emu::meet(emu::mine().named[id], count); }
template <int extent>
bool tl_shuffle_elect() {
  return emu::self->thread.x % (extent ? extent : emu::THREADS) == 0;
}
inline bool elected() {  // elect.sync: the lanes of a warp meet
  emu::meet(emu::mine().warps[emu::self->thread.x / 32], 32);
  return emu::self->thread.x % 32 == 0;
}

template <bool pair>
void tmem_allocate(void* where, int columns) {
  static_assert(pair);
  if (!elected()) return;
  auto& block = emu::mine();
  emu::require(columns >= 32 && (columns & (columns - 1)) == 0, "columns of tensor memory are a power of two");
  *static_cast<uint32_t*>(where) = block.columns;
  block.columns += columns;
  emu::require(block.columns <= emu::COLUMNS, "too many columns of tensor memory");
}
template <bool pair>
void tmem_deallocate(void*, int columns) {
  if (elected()) emu::mine().columns -= columns;
}

inline void tma_load(const CUtensorMap& map, Barrier& barrier, void* to, long inner, long outer) {
  char* shared = emu::mine().shared;
  const size_t base = emu::offset(to);
  emu::require(map.swizzle == 128 && base % 1024 == 0 && map.box[1] * map.width == 128, "a tile of another kind");
  emu::landing.push_back([&map, &barrier, shared, base, inner, outer] {
    for (int row = 0; row < map.box[0]; ++row)
      for (int byte = 0; byte < 128; ++byte) {
        const long r = outer + row, c = inner * map.width + byte;
        const bool inside = r >= 0 && r < map.sizes[0] && c >= 0 && c < map.sizes[1] * map.width;
        shared[emu::swizzled(base + row * 128 + byte)] = inside ? map.base[r * map.stride * map.width + c] : 0;
      }
    barrier.landed(map.box[0] * 128);
  });
}
inline void tma_store(const CUtensorMap& map, const void* from, long inner, long outer) {
  const char* shared = emu::mine().shared;
  const size_t base = emu::offset(from);
  emu::require(map.swizzle == 128 && base % 1024 == 0 && map.box[1] * map.width == 128, "a tile of another kind");
  for (int row = 0; row < map.box[0]; ++row)
    for (int byte = 0; byte < 128; ++byte) {
      const long r = outer + row, c = inner * map.width + byte;
      if (r >= 0 && r < map.sizes[0] && c >= 0 && c < map.sizes[1] * map.width)
        map.base[r * map.stride * map.width + c] = shared[emu::swizzled(base + row * 128 + byte)];
    }
}
inline void tma_store_arrive() {}
template <int, bool>
void tma_store_wait() {}

struct Tcgen05SMemDescriptor {
  uint64_t bits = 0;
  Tcgen05SMemDescriptor operator+(int bytes) const { return {bits + (uint32_t(bytes) >> 4)}; }
  explicit operator uint64_t() const { return bits; }
};
inline void initialize_tcgen05_descriptor(
    Tcgen05SMemDescriptor& out, const void* start, int lead, int stride, int base, int, int layout) {
  emu::require(base == 0, "a descriptor with a base offset");
  out.bits = emu::offset(start) >> 4 | uint64_t(lead) << 16 | uint64_t(stride) << 32 | uint64_t(layout) << 61;
}
template <class T>
void increase_descriptor_offset(Tcgen05SMemDescriptor& out, int bytes) {
  out.bits += uint32_t(bytes) >> 4;
}
inline uint64_t make_sf_smem_desc(const void* start) { return emu::offset(start) >> 4 | uint64_t(8) << 32; }
inline size_t start_of(uint64_t desc) { return (desc & 0x3FFF) << 4; }
inline size_t stride_of(uint64_t desc) { return (desc >> 32 & 0x3FFF) << 4; }

template <bool pair>
void tcgen05_cp(uint64_t desc, uint32_t column) {  // 32 rows of 16 bytes, in cores of 8 rows, to all four warps' lanes
  static_assert(pair);
  if (!elected()) return;
  emu::require(emu::self->rank == 0 && desc >> 61 == 0, "scales that are swizzled, or not from block 0");
  emu::unit.push_back([desc, column] {
    for (int rank = 0; rank < emu::BLOCKS; ++rank)
      for (int lane = 0; lane < emu::LANES; ++lane) {
        const int row = lane % 32;
        const size_t from = start_of(desc) + row / 8 * stride_of(desc) + row % 8 * 16;
        std::memcpy(&emu::blocks[rank].tensor[lane][column], emu::blocks[rank].shared + from, 16);
      }
  });
}

template <DataType type, bool pair>
void tcgen05mma_blockscaled_ss(
    uint64_t a, uint64_t b, uint32_t sums, uint32_t add, uint32_t desc, uint32_t a_scale, uint32_t b_scale) {
  static_assert(pair);
  if (!elected()) return;
  emu::require(emu::self->rank == 0, "a product of a pair that block 1 issues");
  const int a_byte = desc >> 29 & 3, b_byte = desc >> 4 & 3, columns = int(desc >> 17 & 63) * 8;
  // E4M3 x E4M3, neither negated nor transposed, E8M0 scales, 256 rows
  emu::require((desc & ~(3u << 29 | 3u << 4 | 63u << 17)) == (1u << 23 | 2u << 27), "an instruction of another kind");
  emu::require(a >> 61 == 2 && b >> 61 == 2, "a tile that is not swizzled by 128 bytes");
  emu::unit.push_back([=] {
    static float x[256][32], w[256][32];
    const int rows = 128 * emu::BLOCKS;
    const auto fill = [](uint64_t tile, int rank, int row) {
      const size_t line = start_of(tile) + row / 8 * stride_of(tile) + row % 8 * 128;
      return [rank, line](int k) { return emu::e4m3(emu::blocks[rank].shared[emu::swizzled(line + k)]); };
    };
    const auto scale = [](int rank, int lanes, uint32_t at, int row, int byte) {
      const uint32_t word = emu::blocks[rank].tensor[lanes * 32 + row % 32][at + row / 32];
      return emu::e8m0(uint8_t(word >> (8 * byte)));
    };
    for (int row = 0; row < rows; ++row) {
      const auto value = fill(a, row / 128, row % 128);
      for (int k = 0; k < 32; ++k) x[row][k] = value(k);
    }
    for (int row = 0; row < columns; ++row) {
      const auto value = fill(b, row / (columns / 2), row % (columns / 2));
      for (int k = 0; k < 32; ++k) w[row][k] = value(k);
    }
    for (int row = 0; row < rows; ++row) {
      const int rank = row / 128, lane = row % 128;
      const double left = scale(rank, lane / 32, a_scale, lane, a_byte);
      for (int n = 0; n < columns; ++n) {
        double dot = 0;
        for (int k = 0; k < 32; ++k) dot += double(x[row][k]) * w[n][k];
        const double right = scale(rank, lane / 32, b_scale, n, b_byte);
        float& sum = reinterpret_cast<float&>(emu::blocks[rank].tensor[lane][sums + n]);
        sum = float((add ? double(sum) : 0.0) + dot * left * right);
      }
    }
  });
}

template <bool pair>
void tcgen05_mma_arrive(void* barrier) {
  static_assert(pair);
  if (!elected()) return;
  const size_t at = emu::offset(barrier);
  emu::unit.push_back([at] {
    for (int rank = 0; rank < emu::BLOCKS; ++rank)
      reinterpret_cast<Barrier*>(emu::blocks[rank].shared + at)->arrive_here();
  });
}

template <int count, bool packed>
void tcgen05_ld_32dp32bNx(uint32_t column, uint32_t more, void* to) {
  static_assert(!packed);
  std::memcpy(to, &emu::mine().tensor[emu::self->thread.x % 128][column + more], 4 * count);
}

}  // namespace tl

inline void __syncthreads() { emu::meet(emu::mine().named[0], emu::THREADS); }
inline __nv_bfloat162 __float22bfloat162_rn(float2 both) {
  const auto round = [](float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  };
  return {round(both.x), round(both.y)};
}

namespace emu {

inline std::function<void()> body;
inline void enter() {
  body();
  self->over = true;
  swapcontext(&self->context, &scheduler);
}

// Runs clusters one after the other; false if threads wait for each other for ever.
inline bool run(int clusters, size_t dynamic_size, unsigned seed, std::function<void()> kernel) {
  std::mt19937 random(seed);
  body = std::move(kernel);
  dynamic_bytes = (dynamic_size + 15) / 16 * 16;
  for (int cluster = 0; cluster < clusters; ++cluster) {
    auto memory = std::make_unique<Block[]>(BLOCKS);
    blocks = memory.get();
    both = {};
    landing.clear(), unit.clear();
    for (int rank = 0; rank < BLOCKS; ++rank) {
      auto at = reinterpret_cast<uintptr_t>(memory[rank].raw.get());
      memory[rank].shared = reinterpret_cast<char*>((at + 1023) / 1024 * 1024);
      std::memset(memory[rank].shared, 0x7F, SHARED);  // NaN where nothing was written
      std::memset(memory[rank].tensor, 0xFF, sizeof memory[rank].tensor);
    }
    std::vector<std::unique_ptr<Fibre>> fibres;
    for (int i = 0; i < THREADS * BLOCKS; ++i) {
      auto& fibre = *fibres.emplace_back(std::make_unique<Fibre>());
      fibre.thread.x = i % THREADS, fibre.rank = i / THREADS, fibre.block.x = cluster * BLOCKS + fibre.rank;
      getcontext(&fibre.context);
      fibre.context.uc_stack.ss_sp = fibre.stack.data(), fibre.context.uc_stack.ss_size = fibre.stack.size();
      makecontext(&fibre.context, enter, 0);
    }
    size_t over = 0;
    while (over < fibres.size()) {
      bool moved = false, able = !landing.empty() || !unit.empty();
      const int lazy = int(random() % 4);  // of four fibres that could run, how many wait
      for (auto& fibre : fibres) {
        if (fibre->over || (fibre->ready && !fibre->ready())) continue;
        able = true;
        if (int(random() % 4) < lazy) continue;
        fibre->ready = nullptr, self = fibre.get(), moved = true;
        swapcontext(&scheduler, &fibre->context);
        over += fibre->over;
      }
      if (!able && !moved && over < fibres.size()) return false;
      if (!landing.empty() && random() % 3 == 0) {
        const size_t which = random() % landing.size();
        const auto land = landing[which];
        landing.erase(landing.begin() + long(which));
        land();
      }
      for (int some = int(random() % 6); some > 0 && !unit.empty(); --some) {
        const auto work = unit.front();
        unit.pop_front();
        work();
      }
    }
    require(landing.empty() && unit.empty(), "copies or products outlive the cluster");
    require(blocks[0].columns == 0 && blocks[1].columns == 0, "tensor memory is not given back");
  }
  return true;
}

}  // namespace emu
