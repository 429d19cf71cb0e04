#include "operators.h"

extern "C" __attribute__((visibility("default"))) const latentfast::Operators latentfast_operators;
constinit const latentfast::Operators latentfast_operators = {
    latentfast::interpolate,
    latentfast::edit,
    latentfast::blend,
    latentfast::temporal_loss,
};
