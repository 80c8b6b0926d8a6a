// For the bindings: torch's stable ABI alone, so that one build serves every torch from 2.10 on and compiles in seconds.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
