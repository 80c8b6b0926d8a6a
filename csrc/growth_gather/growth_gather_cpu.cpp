#include "growth_gather.h"

namespace growth_ds::GROWTH_DS_ISA {
namespace {

// Where rows of the last axis come from: units of the axes before it, counted up as one reads on.
struct Row {
  int64_t unit[MOST_AXES];
  int64_t from;  // first element of the old row
  double factor;

  void find(const Growth& g, const int64_t* source, const double* factors) {
    from = 0;
    factor = 1.0;
    for (int64_t a = 0; a + 1 < g.axes; ++a) {
      const int64_t entry = g.offset[a] + unit[a];
      from = from * g.old_size[a] + source[entry];
      if (factors) factor *= factors[entry];
    }
    from *= g.old_size[g.axes - 1];
  }

  void next(const Growth& g) {
    for (int64_t a = g.axes - 2; a >= 0; --a) {
      if (++unit[a] < g.new_size[a]) return;
      unit[a] = 0;
    }
  }
};

// Units [j, j + count) of the last axis. Runs of neighbours are copied by vectors.
void part_of_row(const float* x, const int64_t* source, const double* factors, double factor, float* out,
                 int64_t count) {
  if (factors == nullptr) {
    for (int64_t j = 0; j < count;) {
      int64_t run = 1;
      while (j + run < count && source[j + run] == source[j] + run) ++run;
      if (run >= W)
        std::memcpy(out + j, x + source[j], sizeof(float) * static_cast<size_t>(run));
      else
        for (int64_t k = 0; k < run; ++k) out[j + k] = x[source[j + k]];
      j += run;
    }
    return;
  }
  for (int64_t j = 0; j < count; ++j) out[j] = x[source[j]] * static_cast<float>(factor * factors[j]);
}

}  // namespace

void growth_gather(GROWTH_DS_ARGUMENTS) {
  const int64_t last = growth.axes - 1, inner = growth.new_size[last];
  int64_t at = first + begin, j = at % inner, left = at / inner;
  Row row;
  for (int64_t a = last - 1; a >= 0; --a) {
    row.unit[a] = left % growth.new_size[a];
    left /= growth.new_size[a];
  }
  const int64_t* units = source + growth.offset[last];
  const double* each = factors ? factors + growth.offset[last] : nullptr;
  for (int64_t done = begin; done < end;) {
    row.find(growth, source, factors);
    const int64_t count = inner - j < end - done ? inner - j : end - done;
    part_of_row(x + row.from, units + j, each ? each + j : nullptr, row.factor, out + done, count);
    done += count;
    j = 0;
    row.next(growth);
  }
}

}  // namespace growth_ds::GROWTH_DS_ISA
