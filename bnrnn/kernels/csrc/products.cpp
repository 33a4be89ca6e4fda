#include "products.h"

namespace bnrnn {

BNRNN_PRODUCTS(, float)
BNRNN_PRODUCTS(, double)

}  // namespace bnrnn
