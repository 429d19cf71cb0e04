#include "operators.h"

extern "C" __attribute__((visibility("default"))) const latentfast::Operators latentfast_operators;
constinit const latentfast::Operators latentfast_operators = {
    .size = sizeof(latentfast::Operators),
    .interpolate = latentfast::interpolate,
    .edit = latentfast::edit,
    .blend = latentfast::blend,
    .temporal_loss = latentfast::temporal_loss,
    .vector_mix = latentfast::vector_mix,
    .guide = latentfast::guide,
    .combine = latentfast::combine,
};
