// Which kernels this machine runs.
#pragma once
#include <string>
#include <vector>

#include "kernels/table.h"

// The table in use. The first call picks POTSTILL_ISA if that is set, else the best that the CPU supports.
const Kernels& kernels();

// Names of the ISAs that this build holds and this CPU supports, best first.
std::vector<std::string> supported_isas();

// Makes `name` the table in use; throws std::invalid_argument for a name that is unknown or unsupported here.
void use_isa(const std::string& name);
