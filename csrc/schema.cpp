// The operators of torch.ops.tfkern, whichever device runs them.
#include <string>

#include "attention_arguments.h"

STABLE_TORCH_LIBRARY_FRAGMENT(tfkern, m) {
  const std::string shared = tfkern::kAttentionSchema;
  m.def(("attention_forward(" + shared + ") -> (Tensor o, Tensor lse)").c_str());
  m.def(("attention_backward(Tensor do, Tensor? dlse, Tensor o, Tensor lse, " + shared +
         ", bool bias_grad) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsink)")
            .c_str());
  // clang-format off
  m.def(
      "layer_norm_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? seed, "
      "float dropout_p, float eps, bool rms, int axes) "
      "-> (Tensor y, Tensor h, Tensor mean, Tensor rstd)");
  m.def(
      "layer_norm_backward(Tensor dy, Tensor? dh, Tensor h, Tensor? weight, Tensor? bias, "
      "Tensor? mean, Tensor rstd, Tensor? seed, float dropout_p, bool separate_residual, int axes) "
      "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)");
  m.def(
      "rotary(Tensor q, Tensor? k, Tensor cos, Tensor sin, bool interleaved, bool inverse) "
      "-> (Tensor q, Tensor k)");
  m.def(
      "rotary_(Tensor(a!) q, Tensor(b!)? k, Tensor cos, Tensor sin, bool interleaved, bool inverse) "
      "-> ()");
  m.def("linear_int8(Tensor x, Tensor w, Tensor scale, Tensor? bias) -> Tensor");
  m.def(
      "append_(Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) lengths, Tensor k, Tensor v, "
      "Tensor? counts) -> Tensor used");
  // clang-format on
  m.def("linear_product(Tensor a, Tensor b, Tensor? bias, Tensor? a2, Tensor? b2) -> Tensor");
  m.def("linear_pack(Tensor w) -> Tensor");
  m.def(
      "linear_packed(Tensor x, Tensor w, Tensor? b, Tensor? w_up, Tensor? b_up, int N, "
      "str activation) -> Tensor");
  m.def("linear_product_(Tensor(a!) out, Tensor a, Tensor b, Tensor? bias, bool add) -> ()");
  m.def(
      "mlp_hidden(Tensor x, Tensor w, Tensor? b, Tensor? w_up, Tensor? b_up, str activation, bool "
      "keep) "
      "-> (Tensor h, Tensor kept)");
  m.def("mlp_activation_forward(Tensor pre, Tensor? up, str activation) -> Tensor h");
  m.def(
      "mlp_activation_backward(Tensor dh, Tensor pre, Tensor? up, str activation, bool bias) "
      "-> (Tensor dpre, Tensor h, Tensor db)");
  const std::string rows =
      "Tensor targets, Tensor? weight, Tensor lse, Tensor rest, Tensor? dloss, Tensor? dlse, "
      "int ignore_index, float label_smoothing, float softcap, int first, int classes";
  m.def(
      "cross_entropy_forward(Tensor logits, Tensor targets, Tensor? weight, int ignore_index, "
      "float label_smoothing, float softcap, bool ignored_lse) "
      "-> (Tensor loss, Tensor lse, Tensor rest)");
  m.def(("cross_entropy_backward(Tensor logits, " + rows + ") -> Tensor").c_str());
  m.def(("cross_entropy_backward_(Tensor(a!) logits, " + rows + ") -> ()").c_str());
}
