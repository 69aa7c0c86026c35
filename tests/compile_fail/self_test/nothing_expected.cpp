// SPDX-License-Identifier: MIT
// refused: no line says
#ifdef ZAMBA_EXPECT_FAILURE
#error "this is a failure"
#endif
