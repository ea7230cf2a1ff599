namespace {
void kd_loss(const KdLoss&) {}
size_t kd_loss_scratch(int64_t, int64_t) { return 64; }
}  // namespace
