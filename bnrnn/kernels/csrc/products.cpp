#include "products.h"

namespace bnrnn {

BNRNN_TILES(, float)
BNRNN_TILES(, double)
BNRNN_PRODUCTS(, float)
BNRNN_PRODUCTS(, double)

}  // namespace bnrnn
