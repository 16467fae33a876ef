"""The method sc_noise2self of the denoising task of Open Problems; viash sets `par` and `meta`."""

import anndata as ad
import numpy as np

import sc_noise2self as n2s

## VIASH START
par = {
    "input_train": "resources_test/task_denoising/cxg_immune_cell_atlas/train.h5ad",
    "output": "output_sc_noise2self.h5ad",
    "method": "ensemble",
    "scale": "counts",
}
meta = {"name": "sc_noise2self"}
## VIASH END

print("Load input data", flush=True)
input_train = ad.read_h5ad(par["input_train"])

obs, var = input_train.obs[[]].copy(), input_train.var[[]].copy()

print("Denoise", flush=True)
n2s.denoise(input_train, par["method"], layer="counts", scale=par["scale"])
print(n2s.report(input_train), flush=True)

denoised = input_train.layers["denoised"]
if par["scale"] != "counts":  # as counts again, at each cell's own depth: metrics normalise and take logarithms
    denoised = np.expm1(denoised) * (input_train.obs["denoised_size"].to_numpy(np.float32)[:, None] / 1e4)

print("Write output", flush=True)
output = ad.AnnData(
    obs=obs,
    var=var,
    uns={"dataset_id": input_train.uns["dataset_id"], "method_id": meta["name"]},
    layers={"denoised": denoised},
)
output.write_h5ad(par["output"], compression="gzip")
