// The products of many classes, by what multiplies the words of their operands fastest.
#pragma once

#include "amx-inl.h"
#include "register_products-inl.h"

namespace moso_fast {
namespace MOSO_FAST_VARIANT {

template <class Op>
struct ProductsOf {
  using type = RegisterProducts<Op>;
};
#ifdef __AMX_BF16__
template <>
struct ProductsOf<Pair> {
  using type = MatrixUnitProducts;
};
#endif
template <class Op>
using Products = typename ProductsOf<Op>::type;

}  // namespace MOSO_FAST_VARIANT
}  // namespace moso_fast
