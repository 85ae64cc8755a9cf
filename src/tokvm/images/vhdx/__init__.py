"""VHDX and AVHDX: what does this file say, its log included?"""
