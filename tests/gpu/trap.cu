// A kernel that breaks the context it is launched in, as an illegal access does: no call works there
// any more until its process has ended.

extern "C" __global__ void trap() { __trap(); }
